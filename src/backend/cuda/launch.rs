//! Launches: a kernel's arguments as a Rust type, checked against the PTX by a test. One of the two files with `unsafe`.
//!
//! The driver is told where each argument lies and nothing of its type or their number. A [`Kernel`] names the types
//! once; `signatures_are_those_of_the_ptx` compares them with the parameter list of every kernel that ships.
#![allow(unsafe_code, reason = "launches kernels")]

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::marker::PhantomData;
use std::sync::{Arc, PoisonError};

use cudarc::driver::{result, sys};

use super::driver::{Driver, Module, Ptr, failure};
use crate::error::{Error, Result};

/// A family of kernels that take the same arguments: `stem`, or `stem_variant`.
pub(super) struct Kernel<A> {
    pub(super) file: &'static str,
    pub(super) stem: &'static str,
    arguments: PhantomData<fn(A)>,
}

impl<A: Arguments> Kernel<A> {
    /// Kernels of `kernels/{file}.cu`.
    pub(super) const fn new(file: &'static str, stem: &'static str) -> Self {
        Self { file, stem, arguments: PhantomData }
    }

    /// Runs one of the family; nothing to do on an empty grid.
    ///
    /// Safe inside this crate: pointers come from allocations that live until the stream is done with them, and from
    /// views whose lender promised the same; kernels stay within the lengths they are given, which the simulator checks.
    pub(super) fn launch(
        &self,
        driver: &Arc<Driver>,
        variant: &str,
        grid: Grid,
        mut arguments: A,
    ) -> Result<()> {
        let Grid { blocks: (x, y, z), threads, shared } = grid;
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        for (got, limit) in [(x, i32::MAX as u32), (y, 65_535), (z, 65_535)] {
            if got > limit {
                return Err(Error::TooLarge {
                    what: "blocks of a launch",
                    got: got.into(),
                    limit: limit.into(),
                });
            }
        }
        driver.bind()?;
        let name = match variant {
            "" => self.stem.to_owned(),
            _ => format!("{}_{variant}", self.stem),
        };
        let function = function(driver, self.file, name, shared)?;
        // SAFETY: the function's module is loaded and stays so (`Driver`); number and types of the arguments are the
        // kernel's (test below) and outlive the call, which copies them.
        arguments
            .pointers(|list| unsafe {
                result::launch_kernel(
                    function,
                    (x, y, z),
                    (threads, 1, 1),
                    shared,
                    driver.stream(),
                    list,
                )
            })
            .map_err(|e| failure(self.stem, e))
    }
}

/// The shape of a launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub blocks: (u32, u32, u32),
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

impl Grid {
    pub(super) fn new(x: usize, y: usize, threads: u32) -> Self {
        let blocks =
            (u32::try_from(x).unwrap_or(u32::MAX), u32::try_from(y).unwrap_or(u32::MAX), 1);
        Self { blocks, threads, shared: 0 }
    }
}

/// Shared memory that every kernel may have without asking.
const SHARED: u32 = 48 << 10;

fn function(
    driver: &Driver,
    file: &'static str,
    name: String,
    shared: u32,
) -> Result<sys::CUfunction> {
    let mut modules = driver.modules.lock().unwrap_or_else(PoisonError::into_inner);
    if !modules.contains_key(file) {
        let image = CString::new(driver.ptx(file))
            .map_err(|_| Error::Unsupported { what: "PTX", why: "it holds a NUL" })?;
        // SAFETY: a PTX text that ends in NUL; the driver copies it.
        let handle = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) };
        let handle = handle.map_err(|e| failure("cuModuleLoadData", e))?;
        modules.insert(file, Module { handle, functions: HashMap::new() });
    }
    let module = modules.get_mut(file).expect("loaded above");
    if !module.functions.contains_key(&name) {
        let symbol = CString::new(name.as_str()).expect("names of kernels hold no NUL");
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(module.handle, symbol) }
            .map_err(|e| failure("cuModuleGetFunction", e))?;
        module.functions.insert(name.clone(), (function, SHARED));
    }
    let (function, allowed) = module.functions.get_mut(&name).expect("found above");
    if shared > *allowed {
        let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a function of a module that is loaded.
        unsafe { result::function::set_function_attribute(*function, most, shared as i32) }
            .map_err(|e| failure("cuFuncSetAttribute", e))?;
        *allowed = shared;
    }
    Ok(*function)
}

/// A value that a kernel can be given.
pub(super) trait Argument: Copy {
    /// Its type in PTX.
    const PTX: &'static str;
}
impl<T> Argument for Ptr<T> {
    const PTX: &'static str = "u64";
}
macro_rules! scalars {
    ($($scalar:ty: $ptx:literal),*) => {$(impl Argument for $scalar {
        const PTX: &'static str = $ptx;
    })*};
}
scalars!(i32: "u32", u32: "u32", i64: "u64", u64: "u64", f32: "f32");

/// A kernel's arguments in order: a tuple.
pub(super) trait Arguments {
    /// Their types in PTX.
    #[cfg_attr(not(test), expect(dead_code, reason = "what the test compares"))]
    const PTX: &'static [&'static str];
    /// Calls `then` with the address of each.
    fn pointers<Out>(&mut self, then: impl FnOnce(&mut [*mut c_void]) -> Out) -> Out;
}

macro_rules! tuples {
    ($last:ident) => {};
    ($first:ident $($rest:ident)*) => {
        #[allow(non_snake_case, reason = "one name for a type and its value")]
        impl<$first: Argument, $($rest: Argument),*> Arguments for ($first, $($rest),*) {
            const PTX: &'static [&'static str] = &[$first::PTX, $($rest::PTX),*];
            fn pointers<Out>(&mut self, then: impl FnOnce(&mut [*mut c_void]) -> Out) -> Out {
                let ($first, $($rest),*) = self;
                then(&mut [
                    std::ptr::from_mut($first).cast::<c_void>(),
                    $(std::ptr::from_mut($rest).cast::<c_void>()),*
                ])
            }
        }
        tuples!($($rest)*);
    };
}
tuples!(A B C D E F G H I J K L M N O P Q R S T);
