//! A device with one PTX module on it, as the kernel tests and the mutants use it: unmodified cudarc, on the simulator
//! or, with `SIMCUDA=0`, on a GPU.

use std::collections::BTreeMap;
use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError,
    LaunchArgs, LaunchConfig, PushKernelArg, ValidAsZeroBits, sys::CUfunction_attribute,
};
use cudarc::nvrtc::Ptx;
use simcuda::{CpAsync, MmaModel, Policy, Schedule, Streams};

/// What nothing may write over: a NaN that no kernel computes.
pub const CANARY: u32 = 0x7fc0_dead;

/// Why a run did not do what it should.
#[derive(Debug)]
pub enum Failure {
    Driver(DriverError),
    Wrong(String),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Driver(error) => write!(f, "the driver said {error:?}"),
            Self::Wrong(difference) => f.write_str(difference),
        }
    }
}

impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}

pub type Outcome = Result<(), Failure>;
/// Launches a file's kernels and looks at the results.
pub type Drive = fn(&Gpu) -> Outcome;

pub struct Gpu {
    pub stream: Arc<CudaStream>,
    kernels: BTreeMap<String, Kernel>,
}

struct Kernel {
    function: CudaFunction,
    /// Widths of its parameters, from the PTX: the driver cannot check what it is given.
    parameters: Vec<usize>,
}

impl Gpu {
    pub fn new(ordinal: usize, ptx: &str, policy: Policy) -> Result<Self, Failure> {
        simcuda::set_policy(ordinal, policy);
        let context = CudaContext::new(ordinal)?;
        let module = context.load_module(Ptx::from_src(ptx))?;
        let kernel = |(name, parameters): (&str, Vec<usize>)| {
            Ok((name.to_owned(), Kernel { function: module.load_function(name)?, parameters }))
        };
        Ok(Self {
            stream: context.default_stream(),
            kernels: entries(ptx).map(kernel).collect::<Result<_, Failure>>()?,
        })
    }

    /// To be given its arguments, then run.
    pub fn launch<'a>(&'a self, name: &str) -> Launch<'a> {
        let kernel = &self.kernels[name];
        Launch { kernel, launch: self.stream.launch_builder(&kernel.function), widths: Vec::new() }
    }

    /// On the device; never empty, since an allocation cannot be.
    pub fn upload<T: DeviceRepr + Clone + Default>(
        &self,
        data: &[T],
    ) -> Result<CudaSlice<T>, Failure> {
        Ok(if data.is_empty() {
            self.stream.clone_htod(&[T::default()])?
        } else {
            self.stream.clone_htod(data)?
        })
    }

    pub fn zeros<T: DeviceRepr + ValidAsZeroBits>(
        &self,
        n: usize,
    ) -> Result<CudaSlice<T>, Failure> {
        Ok(self.stream.alloc_zeros(n.max(1))?)
    }

    /// Memory nothing was written to.
    pub fn scratch<T: DeviceRepr>(&self, n: usize) -> Result<CudaSlice<T>, Failure> {
        // SAFETY: only kernels see it, and that they write before they read is what is tested.
        Ok(unsafe { self.stream.alloc(n.max(1))? })
    }

    pub fn canaries(&self, n: usize) -> Result<CudaSlice<f32>, Failure> {
        self.upload(&vec![f32::from_bits(CANARY); n])
    }

    /// For kernels that are given one buffer twice.
    pub fn address<T>(&self, data: &CudaSlice<T>) -> u64 {
        data.device_ptr(&self.stream).0
    }

    pub fn download<T: DeviceRepr>(&self, data: &CudaSlice<T>) -> Result<Vec<T>, Failure> {
        Ok(self.stream.clone_dtoh(data)?)
    }
}

/// Kernels of a PTX text, with the widths of their parameters in bytes.
fn entries(ptx: &str) -> impl Iterator<Item = (&str, Vec<usize>)> {
    let widths = |list: &str| {
        let types = list
            .split(".param .")
            .skip(1)
            .map(|p| p[1..3].parse::<usize>().expect("a width in bits"));
        types.map(|bits| bits / 8).collect()
    };
    ptx.split(".entry ").skip(1).map(move |entry| {
        let (name, rest) = entry.split_once('(').expect("a parameter list");
        (name, widths(rest.split(')').next().unwrap_or_default()))
    })
}

pub struct Launch<'a> {
    kernel: &'a Kernel,
    launch: LaunchArgs<'a>,
    widths: Vec<usize>,
}

impl<'a> Launch<'a> {
    pub fn arg<T: Argument>(mut self, argument: T) -> Self
    where
        LaunchArgs<'a>: PushKernelArg<T>,
    {
        self.widths.push(T::WIDTH);
        self.launch.arg(argument);
        self
    }

    /// On a grid of `x` times `y` blocks, with so many bytes of dynamic shared memory.
    pub fn run(mut self, (x, y): (usize, usize), threads: usize, shared: u32) -> Outcome {
        assert_eq!(self.kernel.parameters, self.widths, "parameters of the PTX and of the launch");
        if shared > 48 << 10 {
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            self.kernel.function.set_attribute(most, shared as i32)?;
        }
        let config = LaunchConfig {
            grid_dim: (x as u32, y as u32, 1),
            block_dim: (threads as u32, 1, 1),
            shared_mem_bytes: shared,
        };
        // SAFETY: the arguments are the kernel's, in number and width; whether it stays in their bounds is tested.
        unsafe { self.launch.launch(config)? };
        Ok(())
    }
}

/// What a kernel can be given.
pub trait Argument {
    const WIDTH: usize;
}
impl<T> Argument for &CudaSlice<T> {
    const WIDTH: usize = size_of::<u64>();
}
impl<T> Argument for &mut CudaSlice<T> {
    const WIDTH: usize = size_of::<u64>();
}
macro_rules! scalars {
    ($($scalar:ty),*) => {$(impl Argument for &$scalar {
        const WIDTH: usize = size_of::<$scalar>();
    })*};
}
scalars!(i32, i64, u64, f32);

/// `launch!(gpu, "kernel", (grid x, grid y), threads, dynamic shared bytes; arguments)`.
macro_rules! launch {
    ($gpu:expr, $name:expr, $grid:expr, $threads:expr, $shared:expr; $($argument:expr),+ $(,)?) => {
        $gpu.launch($name)$(.arg($argument))+.run($grid, $threads, $shared)?
    };
}
pub(crate) use launch;

/// Fails with the first difference.
pub fn expect(
    what: &str,
    got: impl IntoIterator<Item = f32>,
    want: impl IntoIterator<Item = (f64, f64)>,
) -> Outcome {
    let (mut got, mut want) = (got.into_iter(), want.into_iter());
    for i in 0.. {
        match (got.next(), want.next()) {
            (None, None) => break,
            (Some(x), Some((y, tolerance))) => {
                let x = f64::from(x);
                // Infinities are equal to themselves only.
                if !(x == y || (x.is_nan() && y.is_nan()) || (x - y).abs() <= tolerance) {
                    return Err(Failure::Wrong(format!(
                        "{what}, {i}: {y} expected within {tolerance:e}, {x} came"
                    )));
                }
            }
            (got, want) => panic!("{what}: {want:?} expected, {got:?} came"),
        }
    }
    Ok(())
}

/// Fails if anything there was written.
pub fn expect_untouched(what: &str, got: &[f32]) -> Outcome {
    match got.iter().position(|x| x.to_bits() != CANARY) {
        Some(i) => Err(Failure::Wrong(format!("{what}: {} written {i} past the end", got[i]))),
        None => Ok(()),
    }
}

pub fn expect_equal<T: PartialEq + std::fmt::Debug>(what: &str, got: &[T], want: &[T]) -> Outcome {
    if got == want {
        return Ok(());
    }
    let i = got.iter().zip(want).take_while(|(a, b)| a == b).count();
    let (got, want) = (got.get(i), want.get(i));
    Err(Failure::Wrong(format!("{what}, {i}: {want:?} expected, {got:?} came")))
}

/// Every schedule, both visibilities of asynchronous copies, all models of mma, exact and perturbed functions.
pub fn policies() -> [Policy; 6] {
    let policy = |schedule, cp_async, mma, perturb, streams, seed| Policy {
        schedule,
        cp_async,
        mma,
        perturb,
        streams,
        seed,
        ..Policy::default()
    };
    use {CpAsync::*, MmaModel::*, Schedule::*, Streams::*};
    [
        policy(InOrder, CpAsync::Late, Chain, false, Eager, 0),
        policy(Quantum(37), Early, Exact, true, Lazy, 1),
        policy(OneBlock, CpAsync::Late, Truncated, true, Eager, 2),
        policy(Random, Early, Truncated, false, Lazy, 3),
        policy(Random, CpAsync::Late, Exact, true, Eager, 4),
        policy(Quantum(1), CpAsync::Late, Chain, true, Eager, 5),
    ]
}
