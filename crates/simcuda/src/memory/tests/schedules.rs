//! Random schedules against a checker that keeps the whole history: for each thread the set of all that happened
//! before, and every access ever made.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

const FLAGS: u64 = 64;
const LANES: u32 = 3;

#[derive(Debug, Clone)]
enum Step {
    /// Lanes and byte offsets.
    Plain {
        warp: u32,
        write: bool,
        width: u32,
        lanes: Vec<(u32, u64)>,
    },
    Barrier {
        block: u32,
    },
    WarpSync {
        warp: u32,
    },
    Fence {
        warp: u32,
        scope: Scope,
    },
    /// Lane 0 at a flag; `ordered`: acquire and release, as far as it reads and writes.
    Strong {
        warp: u32,
        kind: Kind,
        flag: u64,
        scope: Scope,
        ordered: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Load,
    Store,
    Atomic,
}

/// One lane's access.
struct Event {
    thread: usize,
    at: u64,
    width: u32,
    write: bool,
    order: Order,
    step: usize,
    value: u8,
}

type Past = BTreeSet<usize>;

/// What a strong write released: by which block, how far, and what.
#[derive(Clone)]
struct Released(u32, Scope, Past);

/// What a thread knows.
#[derive(Clone, Default)]
struct Thread {
    past: Past,
    /// By scope of the fence.
    fenced: [Option<Past>; 2],
    /// Read but not fenced: the scope the fence must have.
    unfenced: Vec<(Scope, Past)>,
}

#[derive(Default)]
struct History {
    events: Vec<Event>,
    threads: Vec<Thread>,
    flags: [Vec<Released>; 2],
    /// Barriers hand on fences, which the model does not say.
    lenient: bool,
}

fn thread(warp: u32, lane: u32) -> usize {
    (warp * LANES + lane) as usize
}

fn block(thread: usize) -> u32 {
    thread as u32 / LANES / 2
}

impl History {
    /// Whether the event races with an earlier one; enters it.
    fn races(&mut self, event: Event) -> bool {
        let past = &self.threads[event.thread].past;
        let races = self.events.iter().enumerate().any(|(i, other)| {
            let overlap = other.at < event.at + u64::from(event.width)
                && event.at < other.at + u64::from(other.width);
            let strong = match (other.order, event.order) {
                (Order::Strong(a), Order::Strong(b)) => {
                    block(other.thread) == block(event.thread) || a.min(b) == Scope::Device
                }
                _ => false,
            };
            let agree = other.step == event.step && other.value == event.value;
            overlap && (other.write || event.write) && !past.contains(&i) && !strong && !agree
        });
        self.threads[event.thread].past.insert(self.events.len());
        self.events.push(event);
        races
    }

    fn meet(&mut self, threads: std::ops::Range<usize>) {
        let all: Past =
            self.threads[threads.clone()].iter().flat_map(|thread| thread.past.clone()).collect();
        self.threads[threads].iter_mut().for_each(|thread| thread.past = all.clone());
    }

    fn barrier(&mut self, block: u32) {
        let threads = thread(block * 2, 0)..thread(block * 2 + 2, 0);
        self.meet(threads.clone());
        if self.lenient {
            let of = &self.threads[threads.clone()];
            let unfenced: Vec<_> = of.iter().flat_map(|thread| thread.unfenced.clone()).collect();
            let fenced = [0, 1].map(|scope| {
                of.iter().filter_map(|thread| thread.fenced[scope].clone()).reduce(|a, b| &a | &b)
            });
            for thread in &mut self.threads[threads] {
                thread.unfenced = unfenced.clone();
                thread.fenced = fenced.clone();
            }
        }
    }

    fn fence(&mut self, warp: u32, scope: Scope) {
        for thread in &mut self.threads[thread(warp, 0)..thread(warp + 1, 0)] {
            for (needs, read) in &thread.unfenced {
                if *needs <= scope {
                    thread.past.extend(read);
                }
            }
            thread.unfenced.retain(|(needs, _)| *needs > scope);
            for reach in [Scope::Block, Scope::Device] {
                if reach <= scope {
                    thread.fenced[reach as usize] = Some(thread.past.clone());
                }
            }
        }
    }

    fn observe(&mut self, by: usize, flag: usize, scope: Scope, acquire: bool) {
        for Released(from, reach, what) in self.flags[flag].clone() {
            let needs = if from == block(by) { Scope::Block } else { Scope::Device };
            if needs > scope || needs > reach {
                continue;
            }
            if acquire {
                self.threads[by].past.extend(&what);
            } else {
                self.threads[by].unfenced.push((needs, what));
            }
        }
    }

    /// The last event is the strong write.
    fn publish(&mut self, by: usize, flag: usize, scope: Scope, release: bool) {
        let event = self.events.len() - 1;
        let thread = &self.threads[by];
        for reach in [Scope::Block, Scope::Device] {
            let what = if release {
                Some(thread.past.clone())
            } else {
                thread.fenced[reach as usize].clone()
            };
            if let Some(mut what) = what.filter(|_| reach <= scope) {
                what.insert(event);
                self.flags[flag].push(Released(block(by), reach, what));
            }
        }
    }

    /// No byte is read by more threads than a cell remembers.
    fn few_readers(&self) -> bool {
        (0..FLAGS).all(|at| {
            let covers = |event: &&Event| {
                !event.write && (event.at..event.at + u64::from(event.width)).contains(&at)
            };
            self.events
                .iter()
                .filter(covers)
                .map(|event| event.thread)
                .collect::<BTreeSet<_>>()
                .len()
                <= 2
        })
    }
}

/// Runs the steps until the checks or the history see a race; what each saw, and the history.
fn run(steps: &[Step], lenient: bool) -> (Option<Fault>, bool, History) {
    let mut launch = Launch::global(128);
    launch.clocks = Clocks::new(&op(2), 2, 2);
    let threads = vec![Thread::default(); thread(4, 0)];
    let mut history = History { lenient, threads, ..History::default() };
    for (step, what) in steps.iter().enumerate() {
        let event = |thread, at, width, write, order| {
            let value = if write { (thread % 2) as u8 } else { 0 };
            Event { thread, at, width, write, order, step, value }
        };
        let (alarm, race) = match what {
            Step::Plain { warp, write, width, lanes } => {
                let access = by(*warp).width(*width).inst(step as u32 % 3);
                let values: Lanes =
                    std::array::from_fn(|lane| [(thread(*warp, lane as u32) % 2) as u8; 16]);
                let alarm = match write {
                    true => launch.store(access, lanes, &values).err(),
                    false => launch.load(access, lanes).err(),
                };
                let mut lanes = lanes.clone();
                lanes.sort_unstable();
                let event = |(lane, at): &(u32, u64)| {
                    event(thread(*warp, *lane), *at, *width, *write, Order::Weak)
                };
                (alarm, lanes.iter().fold(false, |race, lane| race | history.races(event(lane))))
            }
            Step::Barrier { block } => {
                launch.clocks.barrier(*block, 0, 0b11);
                history.barrier(*block);
                (None, false)
            }
            Step::WarpSync { warp } => {
                launch.clocks.warp_sync(*warp);
                history.meet(thread(*warp, 0)..thread(*warp + 1, 0));
                (None, false)
            }
            Step::Fence { warp, scope } => {
                launch.clocks.fence(*warp, *scope);
                history.fence(*warp, *scope);
                (None, false)
            }
            Step::Strong { warp, kind, flag, scope, ordered } => {
                let (reads, writes) = (*kind != Kind::Store, *kind != Kind::Load);
                let (acquire, release) = (*ordered && reads, *ordered && writes);
                let access = Access { acquire, release, ..by(*warp).strong(*scope) };
                let at = FLAGS + flag * 4;
                let alarm = match kind {
                    Kind::Load => launch.read(access, at).err(),
                    Kind::Store => launch.write(access, at).err(),
                    Kind::Atomic => launch.add(access, &[(0, at)]).err(),
                };
                let (by, flag) = (thread(*warp, 0), *flag as usize);
                let race = history.races(event(by, at, 4, writes, access.order));
                if reads {
                    history.observe(by, flag, *scope, acquire);
                } else {
                    history.flags[flag].clear();
                }
                if writes {
                    history.publish(by, flag, *scope, release);
                }
                (alarm, race)
            }
        };
        if alarm.is_some() || race {
            return (alarm, race, history);
        }
    }
    (None, false, history)
}

fn scope() -> impl Strategy<Value = Scope> {
    prop_oneof![Just(Scope::Block), Just(Scope::Device)]
}

/// Accesses of up to `lanes` lanes; those of one store that meet differ in value.
fn plain(lanes: u32) -> impl Strategy<Value = Step> {
    let lane = (0..lanes, 0u64..3);
    (0u32..4, any::<bool>(), 0u32..3, prop::collection::vec(lane, 1..=lanes as usize)).prop_map(
        |(warp, write, width, mut lanes)| {
            let width = 1 << width;
            lanes.iter_mut().for_each(|(_, at)| *at *= u64::from(width));
            lanes.sort_unstable();
            lanes.dedup_by_key(|(lane, _)| *lane);
            if write {
                lanes.dedup_by_key(|(_, at)| *at);
                let mut seen = BTreeSet::new();
                lanes.retain(|(lane, at)| seen.insert((*at, lane % 2)));
            }
            Step::Plain { warp, write, width, lanes }
        },
    )
}

fn ordering() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u32..2).prop_map(|block| Step::Barrier { block }),
        (0u32..4).prop_map(|warp| Step::WarpSync { warp }),
    ]
}

fn strong(widest: impl Strategy<Value = Scope>) -> impl Strategy<Value = Step> {
    let kind = prop_oneof![Just(Kind::Load), Just(Kind::Store), Just(Kind::Atomic)];
    prop_oneof![
        1 => (0u32..4, scope()).prop_map(|(warp, scope)| Step::Fence { warp, scope }),
        2 => (0u32..4, kind, 0u64..2, widest, any::<bool>())
            .prop_map(|(warp, kind, flag, scope, ordered)| Step::Strong { warp, kind, flag, scope, ordered }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn threads_and_barriers_are_exact(
        steps in prop::collection::vec(prop_oneof![plain(LANES), ordering()], 1..30),
    ) {
        let (alarm, race, history) = run(&steps, false);
        prop_assert!(alarm.is_none() || race, "false alarm: {:?}", alarm);
        prop_assert!(alarm.is_some() || !race || !history.few_readers(), "missed");
    }

    #[test]
    fn fences_and_flags_are_exact_for_one_lane_per_warp(
        steps in prop::collection::vec(prop_oneof![2 => plain(1), 1 => ordering(), 4 => strong(Just(Scope::Device))], 1..40),
    ) {
        let (alarm, race, history) = run(&steps, true);
        prop_assert!(alarm.is_none() || race, "false alarm: {:?}", alarm);
        prop_assert!(alarm.is_some() || !race || !history.few_readers(), "missed");
    }

    #[test]
    fn nothing_is_reported_that_the_model_allows(
        steps in prop::collection::vec(prop_oneof![2 => plain(LANES), 1 => ordering(), 4 => strong(scope())], 1..40),
    ) {
        let (alarm, race, _) = run(&steps, false);
        prop_assert!(alarm.is_none() || race, "false alarm: {:?}", alarm);
    }
}
