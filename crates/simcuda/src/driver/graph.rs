//! Graphs: captured work, instantiated and replayed.

use std::sync::Arc;

use super::abi::Out;
use super::clock::Clock;
use super::device::{self, Device};
use super::handle::{Handle, Kind};
use super::status::{Cu, Status};
use super::stream::locked;
use super::work::Action;

const AUTO_FREE_ON_LAUNCH: u64 = 1;
const DEVICE_LAUNCH: u64 = 4;
const USE_NODE_PRIORITY: u64 = 8;

/// A node: what it does, after which others, and the captured stream it came from.
pub struct Node {
    pub after: Vec<usize>,
    pub lane: usize,
    pub action: Action,
}

/// A captured graph; nodes come after those they depend on.
pub struct Graph {
    pub context: Handle,
    pub lanes: usize,
    pub nodes: Vec<Node>,
}

/// An instantiated graph.
pub struct Exec {
    pub graph: Arc<Graph>,
    /// Actor and last operation of each lane.
    actors: Vec<(u32, u32)>,
    /// The end of its last launch: launches of one graph follow each other.
    last: Option<(u64, Clock)>,
}

impl Device {
    /// Puts a graph into a stream: a beginning, the nodes in their order, an end.
    fn launch_graph(&mut self, exec: Handle, stream: Handle) -> Cu {
        let found = self.execs.get(&exec).ok_or(Status::INVALID_HANDLE)?;
        let (graph, mut actors, last) =
            (found.graph.clone(), found.actors.clone(), found.last.clone());
        for node in &graph.nodes {
            if let Action::Launch(launch) = &node.action
                && !self.modules.contains_key(&launch.module.handle)
            {
                return Err(Status::INVALID_HANDLE); // its module was unloaded
            }
        }
        let mut before = Vec::new();
        if let Some((task, clock)) = last {
            before.push(task);
            self.streams.get_mut(&stream).ok_or(Status::INVALID_HANDLE)?.clock.join(&clock);
        }
        let begin = self.enqueue(stream, &before, Action::Mark)?;
        let role = self.streams[&stream].role;
        let start = self.streams[&stream].clock.clone();
        let mut done: Vec<(u64, Clock)> = Vec::with_capacity(graph.nodes.len());
        for node in &graph.nodes {
            let mut clock = start.clone();
            node.after.iter().for_each(|&before| clock.join(&done[before].1));
            let (actor, seq) = &mut actors[node.lane];
            *seq += 1;
            clock.tick(self.ordinal, *actor, *seq);
            let label = format!("{} in a graph", node.action.label());
            let order = self.order(*actor, *seq, clock.on(self.ordinal), label);
            let after = node.after.iter().map(|&before| done[before].0).chain([begin]).collect();
            let task = self.enqueue_branch(graph.context, role, after, order, node.action.clone());
            done.push((task, clock));
        }
        if let Some(stream) = self.streams.get_mut(&stream) {
            done.iter().for_each(|(_, clock)| stream.clock.join(clock));
        }
        let tasks: Vec<u64> = done.iter().map(|&(task, _)| task).collect();
        let end = self.enqueue(stream, &tasks, Action::Mark)?;
        let clock = self.streams[&stream].clock.clone();
        if let Some(exec) = self.execs.get_mut(&exec) {
            (exec.actors, exec.last) = (actors, Some((end, clock)));
        }
        Ok(())
    }
}

/// Locks the device of a graph whose context is usable.
fn graph_locked(graph: Handle) -> Cu<(std::sync::MutexGuard<'static, Device>, Arc<Graph>)> {
    let device = device::owner(graph, Kind::Graph).map_err(|_| Status::INVALID_VALUE)?;
    let found = device.graphs.get(&graph).ok_or(Status::INVALID_VALUE)?.clone();
    device.usable(found.context)?;
    Ok((device, found))
}

entries! {
    fn cuGraphInstantiateWithFlags(exec: Out<Handle>, graph: Handle, flags: u64) {
        exec.check()?;
        let (mut device, graph) = graph_locked(graph)?;
        let known = AUTO_FREE_ON_LAUNCH | DEVICE_LAUNCH | USE_NODE_PRIORITY;
        if flags & !known != 0 || flags & DEVICE_LAUNCH != 0 && flags & AUTO_FREE_ON_LAUNCH != 0 {
            return Err(Status::INVALID_VALUE);
        }
        if flags & DEVICE_LAUNCH != 0 {
            return Err(Status::NOT_SUPPORTED);
        }
        let actors = (0..graph.lanes).map(|_| (device.actor(), 0)).collect();
        let handle = device.handle(Kind::GraphExec);
        device.execs.insert(handle, Exec { graph, actors, last: None });
        exec.set(handle)
    }

    fn cuGraphDestroy(graph: Handle) {
        let (mut device, _) = graph_locked(graph)?;
        device.graphs.remove(&graph);
        Ok(())
    }

    fn cuGraphExecDestroy(exec: Handle) {
        let mut device = device::owner(exec, Kind::GraphExec).map_err(|_| Status::INVALID_VALUE)?;
        device.execs.remove(&exec).map(drop).ok_or(Status::INVALID_VALUE)
    }

    fn cuGraphLaunch(exec: Handle, stream: Handle) {
        let (mut device, stream) = to_stream(exec, stream)?;
        device.not_implicit(stream)?;
        device.launch_graph(exec, stream)
    }

    /// There is nothing to upload.
    fn cuGraphUpload(exec: Handle, stream: Handle) {
        to_stream(exec, stream).map(drop)
    }
}

/// Locks the device of a stream that an instantiated graph may go into.
fn to_stream(exec: Handle, stream: Handle) -> Cu<(std::sync::MutexGuard<'static, Device>, Handle)> {
    let (mut device, stream) = locked(stream)?;
    if !device.execs.contains_key(&exec) {
        return Err(Status::INVALID_VALUE);
    }
    if device.is_capturing(stream) {
        device.invalidate_of(stream);
        return Err(Status::NOT_SUPPORTED); // a graph as a node of another is not simulated
    }
    Ok((device, stream))
}
