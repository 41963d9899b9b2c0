//! Caches on the device against those on the host, and what only a device has: counters instead of errors, graphs.

mod batch;
pub mod decode;
pub mod drives;
mod errors;
mod histories;
mod lent;
mod outputs;
mod sectors;
pub mod selected;

use kvbudget::backend::cpu::{Cpu, HostLayer, HostSlice};
use kvbudget::backend::cuda::cache::{
    Batch, FlatCache, Member, Order, PagePool, PagedCache, Recompress, Recompression, Share,
    Snapshot, Workspace,
};
use kvbudget::backend::cuda::{self, Cuda, DeviceLayer, DeviceSlice, Floats, Output, Selection};
use kvbudget::backend::ops::Attend;
use kvbudget::{Dtype, LayerShape, LayerView, Position, Ragged, Result, Rows, cache};
use kvbudget_testkit::data::{Place, Tensor, with_rows};

use crate::device::Gpu;

pub const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

/// Numbers without pattern.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

#[derive(Clone, Copy)]
pub struct Shape {
    pub heads: u32,
    pub dim: u32,
    pub dtype: Dtype,
}

impl Shape {
    pub fn layer(self) -> LayerShape {
        LayerShape::new(2 * self.heads, self.heads, self.dim).unwrap()
    }

    /// Random rows `[heads, len, dim]`.
    pub fn tensor(self, random: &mut Random, heads: u32, len: u32, place: Place) -> Tensor {
        let mut row =
            || (0..self.dim).map(|_| random.next() as f64 / 2f64.powi(63) - 1.0).collect();
        let rows = (0..heads).map(|_| (0..len).map(|_| row()).collect()).collect();
        Tensor::new(rows, self.dim, self.dtype, place)
    }
}

/// A position with the bytes of its key and value rows.
pub type Row = (Position, Vec<u8>, Vec<u8>);

/// Some elements as they are in memory.
pub fn bytes_of(elements: HostSlice<'_>, at: std::ops::Range<usize>) -> Vec<u8> {
    match elements {
        HostSlice::F32(e) => e[at].iter().flat_map(|x| x.to_ne_bytes()).collect(),
        HostSlice::F16(e) => e[at].iter().flat_map(|x| x.to_ne_bytes()).collect(),
        HostSlice::BF16(e) => e[at].iter().flat_map(|x| x.to_ne_bytes()).collect(),
    }
}

/// What each head of a host cache holds.
pub fn host_rows(view: &HostLayer<'_>) -> Vec<Vec<Row>> {
    let bytes = |rows: &Rows<'_, HostSlice<'_>>, h, s| {
        let start = rows.start(h, s);
        bytes_of(rows.storage(), start..start + rows.dim())
    };
    let positions = view.positions().unwrap();
    let row = |h: usize, s: usize| (positions[h][s], bytes(view.k(), h, s), bytes(view.v(), h, s));
    (0..positions.len()).map(|h| (0..positions[h].len()).map(|s| row(h, s)).collect()).collect()
}

/// What each head of a device cache holds.
pub fn device_rows(shape: Shape, snapshot: &Snapshot<'_>) -> Vec<Vec<Row>> {
    // The attention's view: there is one even if slots are in no order.
    let view = snapshot.attend_view(nothing(shape)).unwrap();
    let bytes = |rows: &Rows<'_, DeviceSlice<'_>>, h, s| {
        let size = shape.dtype.size();
        let mut bytes = vec![0u8; rows.dim() * size];
        read(rows.storage().address() + (rows.start(h, s) * size) as u64, &mut bytes);
        bytes
    };
    let positions = snapshot.positions();
    let row = |h: usize, s: usize| (positions[h][s], bytes(&view.k, h, s), bytes(&view.v, h, s));
    (0..positions.len()).map(|h| (0..positions[h].len()).map(|s| row(h, s)).collect()).collect()
}

/// Copies device memory; the context is current, since a snapshot was just read.
#[allow(unsafe_code, reason = "tests look at device memory")]
fn read(address: u64, to: &mut [u8]) {
    // SAFETY: rows that a view lends; the driver checks the rest.
    unsafe { cudarc::driver::result::memcpy_dtoh_sync(to, address) }.unwrap();
}

#[allow(unsafe_code, reason = "rows of no length")]
fn nothing(shape: Shape) -> Rows<'static, DeviceSlice<'static>> {
    // SAFETY: no element.
    let storage = unsafe { DeviceSlice::new(0, 0, shape.dtype) };
    Rows::heads_first(storage, shape.heads, 0, shape.dim).unwrap()
}

/// A cache of either kind, with its pool.
pub enum Cache {
    Flat(FlatCache),
    Paged(PagedCache, PagePool),
}

impl Cache {
    pub fn gather(
        cuda: &Cuda,
        view: &DeviceLayer<'_>,
        kept: &Ragged<Position>,
        slack: u32,
        page: Option<u32>,
    ) -> Result<Self> {
        let Some(page) = page else {
            return Ok(Self::Flat(FlatCache::gather(cuda, view, kept, slack)?));
        };
        // Ample: each head may be as long as the sequence.
        let pages = view.k().heads() as u32 * ((view.tokens() + slack).div_ceil(page) + 1);
        let (dtype, dim) = (view.k().dtype(), view.k().dim() as u32);
        let mut pool = PagePool::new(cuda, dtype, dim, page, pages)?;
        let cache = PagedCache::gather(&mut pool, view, kept, slack)?;
        Ok(Self::Paged(cache, pool))
    }

    pub fn compact(&mut self, kept: &Ragged<Position>, order: Order) -> Result<()> {
        match self {
            Self::Flat(cache) => cache.compact(kept, order),
            Self::Paged(cache, pool) => cache.compact(pool, kept, order),
        }
    }

    pub fn append(
        &mut self,
        k: &Rows<'_, DeviceSlice<'_>>,
        v: &Rows<'_, DeviceSlice<'_>>,
    ) -> Result<()> {
        match self {
            Self::Flat(cache) => cache.append(k, v),
            Self::Paged(cache, pool) => cache.append(pool, k, v),
        }
    }

    pub fn compact_selected(&mut self, selection: &Selection, order: Order) -> Result<()> {
        match self {
            Self::Flat(cache) => cache.compact_selected(selection, 0, order),
            Self::Paged(cache, pool) => cache.compact_selected(pool, selection, 0, order),
        }
    }

    pub fn attend_bytes(&self, query_heads: usize, tokens: u32) -> usize {
        match self {
            Self::Flat(cache) => cache.attend_bytes(query_heads, tokens),
            Self::Paged(cache, _) => cache.attend_bytes(query_heads, tokens),
        }
        .unwrap()
    }

    pub fn attend<'a>(
        &self,
        op: &Attend,
        q: &Rows<'_, DeviceSlice<'_>>,
        out: impl Into<Output<'a>>,
        lse: Option<&mut Floats>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        match self {
            Self::Flat(cache) => cache.attend(op, q, out, lse, workspace),
            Self::Paged(cache, pool) => cache.attend(pool, op, q, out, lse, workspace),
        }
    }

    pub fn member(&self) -> Member<'_> {
        match self {
            Self::Flat(cache) => cache.member(),
            Self::Paged(cache, pool) => cache.member(pool).unwrap(),
        }
    }

    pub fn recompression(&self, config: &Recompress, query_heads: usize) -> Result<Recompression> {
        match self {
            Self::Flat(cache) => cache.recompression(config, query_heads),
            Self::Paged(cache, _) => cache.recompression(config, query_heads),
        }
    }

    pub fn recompress(
        &mut self,
        q: &Rows<'_, DeviceSlice<'_>>,
        with: &mut Recompression,
    ) -> Result<()> {
        match self {
            Self::Flat(cache) => cache.recompress(q, with),
            Self::Paged(cache, pool) => cache.recompress(pool, q, with),
        }
    }

    pub fn read(&self) -> Snapshot<'_> {
        match self {
            Self::Flat(cache) => cache.read(),
            Self::Paged(cache, pool) => cache.read(pool),
        }
        .unwrap()
    }

    pub fn check(&self) -> Result<()> {
        match self {
            Self::Flat(cache) => cache.check(),
            Self::Paged(cache, _) => cache.check(),
        }
    }

    pub fn capacity(&self) -> Vec<u32> {
        match self {
            Self::Flat(cache) => cache.capacity().to_vec(),
            Self::Paged(cache, _) => cache.capacity().to_vec(),
        }
    }
}

/// A cache on the device and the same on the host, which always has room.
pub struct Twins {
    pub shape: Shape,
    pub device: Cache,
    pub host: cache::FlatCache,
    pub ascending: bool,
    /// What the device's cache lies in, if that is not its own.
    pub engine: Vec<cuda::Tensor>,
}

/// Room that no test fills.
const AMPLE: u32 = 4000;

impl Twins {
    /// What both keep of a fresh layer of `len` tokens.
    pub fn new(
        gpu: &Gpu,
        shape: Shape,
        random: &mut Random,
        (len, percent, slack): (u32, u64, u32),
        place: Place,
        page: Option<u32>,
    ) -> Self {
        let tensors = [(); 2].map(|()| shape.tensor(random, shape.heads, len, place));
        let tensors = [&tensors[0], &tensors[1]];
        let all: Vec<Vec<Position>> = vec![(0..len).map(Position).collect(); shape.heads as usize];
        let kept = some_of(random, &all, percent);
        let host = with_rows(&Cpu::new(), &tensors, |rows| {
            let view = LayerView::new(shape.layer(), len, rows[0], rows[1]).unwrap();
            cache::FlatCache::gather(&view, &kept, AMPLE).unwrap()
        });
        let device = with_rows(gpu, &tensors, |rows| {
            let view = LayerView::new(shape.layer(), len, rows[0], rows[1]).unwrap();
            Cache::gather(&gpu.cuda, &view, &kept, slack, page).unwrap()
        });
        let twins = Self { shape, device, host, ascending: true, engine: vec![] };
        twins.compare();
        twins
    }

    pub fn compare(&self) {
        let snapshot = self.device.read();
        let view = self.host.view(self.shape.layer()).unwrap();
        assert_eq!(snapshot.tokens(), view.tokens());
        assert_eq!(snapshot.lens(), self.host.lens());
        assert_eq!(snapshot.bytes_used(), self.host.bytes_used());
        let mut rows = device_rows(self.shape, &snapshot);
        if !self.ascending {
            rows.iter_mut().for_each(|head| head.sort_by_key(|(position, ..)| *position));
        }
        assert!(rows == host_rows(&view), "rows differ");
    }

    pub fn compact(&mut self, random: &mut Random, percent: u64, order: Order) {
        let kept = some_of(random, self.host.positions(), percent);
        self.device.compact(&kept, order).unwrap();
        self.host.compact(&kept).unwrap();
        self.ascending &= order == Order::Ascending;
    }

    /// Appends to both if all heads have room; otherwise the device says so, and nothing changes.
    pub fn append(&mut self, gpu: &Gpu, random: &mut Random, new: u32, place: Place) {
        let tensors = [(); 2].map(|()| self.shape.tensor(random, self.shape.heads, new, place));
        let tensors = [&tensors[0], &tensors[1]];
        let capacity = self.device.capacity();
        let fits = self.host.lens().iter().zip(capacity).all(|(len, room)| len + new <= room);
        let before = self.device.check().is_ok();
        with_rows(gpu, &tensors, |rows| self.device.append(&rows[0], &rows[1]).unwrap());
        assert_eq!(self.device.check().is_ok(), before && fits);
        if fits {
            with_rows(&Cpu::new(), &tensors, |rows| {
                self.host.append(&rows[0], &rows[1]).unwrap();
            });
        }
    }
}

/// About `percent` of the positions of each head; of some heads none or all.
pub fn some_of(random: &mut Random, held: &[Vec<Position>], percent: u64) -> Ragged<Position> {
    let mut some = |head: &Vec<Position>| {
        let percent = [0, 100, percent, percent, percent][random.below(5) as usize];
        head.iter().copied().filter(|_| random.below(100) < percent).collect()
    };
    held.iter().map(&mut some).collect::<Vec<Vec<_>>>().into_iter().collect()
}
