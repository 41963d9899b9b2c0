//! The caller's pointers as types, so that entry points read as safe code.
//!
//! A driver cannot check what it is given: every access here is sound exactly if the caller kept the driver API's
//! contract (a pointer is null or points to what the function documents).

use std::ffi::{CStr, c_char, c_void};

use super::status::{Cu, Status};

/// Where a result goes.
#[repr(transparent)]
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    pub fn new(at: *mut T) -> Self {
        Self(at)
    }

    /// Writes the result; null is CUDA_ERROR_INVALID_VALUE.
    pub fn set(&self, value: T) -> Cu {
        if self.0.is_null() {
            return Err(Status::INVALID_VALUE);
        }
        self.set_if_wanted(value);
        Ok(())
    }

    /// Writes a result that callers may leave out.
    pub fn set_if_wanted(&self, value: T) {
        if !self.0.is_null() {
            // SAFETY: not null, and the caller vouches for the rest.
            unsafe { self.0.write(value) }
        }
    }

    /// Refuses a null pointer before anything was done.
    pub fn check(&self) -> Cu {
        if self.0.is_null() { Err(Status::INVALID_VALUE) } else { Ok(()) }
    }

    /// What the caller put there, for arguments that go both ways.
    pub fn get(&self) -> Cu<T>
    where
        T: Copy,
    {
        In(self.0.cast_const()).get()
    }
}

/// Where an argument is.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct In<T>(*const T);

impl<T> In<T> {
    pub const NULL: Self = Self(std::ptr::null());
}

impl<T: Copy> In<T> {
    pub fn is_null(self) -> bool {
        self.0.is_null()
    }

    pub fn get(self) -> Cu<T> {
        self.at(0)
    }

    /// An element of an array.
    pub fn at(self, index: usize) -> Cu<T> {
        if self.0.is_null() {
            return Err(Status::INVALID_VALUE);
        }
        // SAFETY: not null; the caller vouches for an array of at least this length.
        Ok(unsafe { self.0.add(index).read_unaligned() })
    }
}

/// A C string.
#[repr(transparent)]
pub struct Text(*const c_char);

impl Text {
    /// The bytes before the NUL.
    pub fn bytes(&self) -> Cu<&[u8]> {
        if self.0.is_null() {
            return Err(Status::INVALID_VALUE);
        }
        // SAFETY: not null; the caller vouches for the NUL.
        Ok(unsafe { CStr::from_ptr(self.0) }.to_bytes())
    }

    /// The text, if it is UTF-8.
    pub fn get(&self) -> Cu<&str> {
        std::str::from_utf8(self.bytes()?).map_err(|_| Status::INVALID_VALUE)
    }
}

/// A buffer for text.
#[repr(transparent)]
pub struct TextOut(*mut c_char);

impl TextOut {
    /// Writes as much of the text as fits, and a NUL.
    pub fn set(&self, text: &str, room: i32) -> Cu {
        let room = usize::try_from(room).map_err(|_| Status::INVALID_VALUE)?;
        if self.0.is_null() || room == 0 {
            return Err(Status::INVALID_VALUE);
        }
        let n = text.len().min(room - 1);
        // SAFETY: the caller vouches for `room` bytes; n + 1 <= room.
        unsafe {
            self.0.copy_from_nonoverlapping(text.as_ptr().cast(), n);
            self.0.add(n).write(0);
        }
        Ok(())
    }
}

/// The caller's memory, as an address: kept in tasks that may run later, on another thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Host(pub usize);

impl Host {
    /// The bytes there.
    pub fn bytes<'a>(self, n: usize) -> &'a [u8] {
        if n == 0 {
            return &[];
        }
        // SAFETY: the caller of the copy vouches that n bytes lie here until the copy has run.
        unsafe { std::slice::from_raw_parts(self.0 as *const u8, n) }
    }

    /// Writes bytes there.
    pub fn write(self, bytes: &[u8]) {
        // SAFETY: the caller of the copy vouches for room until the copy has run.
        unsafe { (self.0 as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
    }
}

/// CUhostFn.
pub type HostFunction = extern "C" fn(*mut c_void);

/// CUuuid.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Uuid(pub [u8; 16]);

/// CUmemPoolProps; only what this driver reads has a name.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct PoolProps {
    pub alloc_type: u32,
    pub handle_types: u32,
    pub location_type: u32,
    pub location_id: i32,
    pub security: usize,
    pub max_size: usize,
    pub usage: u16,
    pub reserved: [u8; 54],
}
