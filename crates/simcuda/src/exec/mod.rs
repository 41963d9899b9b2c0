//! Running a kernel: INTERFACE for the driver.

mod registers;

/// A kernel launch.
pub struct Launch<'a> {
    pub kernel: &'a crate::ptx::Kernel,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub dynamic_shared: u32,
    /// The parameter space, laid out as `kernel.params` says.
    pub params: &'a [u8],
    /// Its place in the order of stream work.
    pub op: crate::memory::OpOrder,
}

/// What a launch did.
pub struct Outcome {
    pub counters: crate::Counters,
    /// The first finding; the launch stopped there.
    pub report: Option<crate::Report>,
    /// What `printf` wrote.
    pub printed: String,
}

/// Runs a launch to its end or to its first fault. Deterministic: the same launch, memory and policy give the same.
pub fn run(launch: &Launch<'_>, memory: &mut crate::memory::Memory, policy: &crate::Policy) -> Outcome {
    todo!()
}
