//! What a check found: one class per cause, with the place in the source.

use std::fmt;

/// Why a launch was stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Outside every allocation, or past the end of one.
    OutOfBounds,
    /// Inside an allocation that was freed.
    UseAfterFree,
    /// Address not a multiple of the access's width.
    Misaligned,
    /// Memory or a register read before anything was written there.
    Uninitialised,
    /// Two accesses without an order between them, one of them a write.
    Race,
    /// Shared memory read while `cp.async` is still to write it.
    AsyncNotWaited,
    /// Lanes of a warp at different barriers, or a barrier that some can never reach.
    DivergentBarrier,
    /// A `.sync` mask that lacks the caller, names exited lanes, or differs between lanes; a shuffle from outside it.
    BadMask,
    /// No warp can go on.
    Deadlock,
    /// A write to constant or parameter memory, or a non-coherent read of what this launch wrote.
    ReadOnly,
    /// `trap`.
    Trap,
    /// `__assertfail`.
    Assert,
    /// Stream work without an order between it, one of them a write.
    StreamRace,
    /// Host memory changed between an asynchronous copy's submission and its execution.
    HostBuffer,
    /// Something this simulator does not do; the launch did not run on.
    Unsupported,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The cause.
    pub class: Class,
    /// What was expected and what came: addresses, distances, masks, the other party.
    pub message: String,
    /// Kernel, empty outside a launch.
    pub kernel: String,
    /// `file:line` of the CUDA source, from `-lineinfo`, if the PTX has it.
    pub source: Option<String>,
    /// The instruction's text.
    pub instruction: String,
    /// Block and thread, if one thread is to blame.
    pub thread: Option<([u32; 3], [u32; 3])>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.class, self.message)?;
        if !self.kernel.is_empty() {
            write!(f, "\n  in {}", self.kernel)?;
        }
        if let Some(source) = &self.source {
            write!(f, " at {source}")?;
        }
        if !self.instruction.is_empty() {
            write!(f, ": `{}`", self.instruction)?;
        }
        if let Some((block, thread)) = self.thread {
            write!(f, "\n  block {block:?}, thread {thread:?}")?;
        }
        Ok(())
    }
}
