//! CUdevice_attribute as data: an H100 SXM, as far as this simulator keeps to it.

pub const NAME: &str = "simcuda H100";
pub const MULTIPROCESSORS: u32 = 132;
pub const THREADS_PER_BLOCK: u32 = 1024;
pub const BLOCK_DIM: [u32; 3] = [1024, 1024, 64];
pub const GRID_DIM: [u32; 3] = [i32::MAX as u32, 65_535, 65_535];
pub const THREADS_PER_MULTIPROCESSOR: u32 = 2048;
pub const BLOCKS_PER_MULTIPROCESSOR: u32 = 32;
pub const REGISTERS: u32 = 65_536;
/// Shared memory of a block without opt-in, with it, of a multiprocessor, and what each block loses to the system.
pub const SHARED: u32 = 48 << 10;
pub const SHARED_OPT_IN: u32 = 227 << 10;
pub const SHARED_PER_MULTIPROCESSOR: u32 = 228 << 10;
pub const SHARED_RESERVED: u32 = 1 << 10;

/// The value of an attribute. Attributes that a driver knows and an H100 lacks, or that this simulator refuses
/// (managed and mapped memory, textures, clusters, virtual memory), are 0; unknown ones are None.
pub fn get(attribute: u32, ordinal: i32) -> Option<i32> {
    Some(match attribute {
        1 => THREADS_PER_BLOCK as i32,
        2..=4 => BLOCK_DIM[attribute as usize - 2] as i32,
        5..=7 => GRID_DIM[attribute as usize - 5] as i32,
        8 => SHARED as i32,
        9 => 65_536,    // constant memory
        10 => 32,       // warp
        11 => i32::MAX, // pitch
        12 | 82 => REGISTERS as i32,
        13 => 1_980_000, // clock, kHz
        14 => 512,       // texture alignment
        15 | 31 => 1,    // copies and kernels overlap, kernels run concurrently
        16 => MULTIPROCESSORS as i32,
        30 => 512,       // surface alignment
        32 => 1,         // ECC
        33 => ordinal,   // PCI bus
        36 => 2_619_000, // memory clock, kHz
        37 => 5120,      // bus width
        38 => 50 << 20,  // L2
        39 => THREADS_PER_MULTIPROCESSOR as i32,
        40 => 3,  // copy engines
        41 => 1,  // unified addressing
        51 => 32, // texture pitch alignment
        75 => super::init::from_environment("SIMCUDA_CAPABILITY", 90) / 10,
        76 => super::init::from_environment("SIMCUDA_CAPABILITY", 90) % 10,
        78 => 1,      // stream priorities
        79 | 80 => 1, // L1
        81 => SHARED_PER_MULTIPROCESSOR as i32,
        87 => 2, // f32 to f64
        90 => 1, // preemption
        95 => 1, // cooperative launch
        97 => SHARED_OPT_IN as i32,
        106 => BLOCKS_PER_MULTIPROCESSOR as i32,
        111 => SHARED_RESERVED as i32,
        115 => 1, // memory pools
        _ if (1..=161).contains(&attribute) => 0,
        _ => return None,
    })
}
