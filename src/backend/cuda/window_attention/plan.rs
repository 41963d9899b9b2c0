//! How window attention is cut into launches, from what the host knows: shapes and upper bounds of lengths.

use bytemuck::{Pod, Zeroable};

use super::super::views::HeadRows;
use crate::backend::ops::{Reduce, WindowAttention};
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// Largest row-pooling kernel: what a warp's ring of probabilities holds.
const POOL: u32 = 31;
/// Largest head dim.
const DIM: u32 = 256;
/// Query rows of a warp, and of a block.
const WARP_ROWS: u32 = 32;
const BLOCK_ROWS: u32 = 128;
/// Slots that a block takes at least, so that its queries cost little beside them.
const CHUNK: u64 = 1024;

/// What the kernels are asked for: the twin of `Flags` in `kernels/window_attention.cuh`.
pub(super) mod flags {
    pub(in super::super) const WINDOW_MAX: u32 = 1;
    pub(in super::super) const GROUP_MAX: u32 = 2;
    pub(in super::super) const SCORE_WINDOW: u32 = 4;
    pub(in super::super) const POOLED: u32 = 8;
    pub(in super::super) const MEANS: u32 = 16;
    pub(in super::super) const ONLY_MEANS: u32 = 32;
    pub(in super::super) const HALF: u32 = 64;
}

/// Query rows of one query head; a twin in `kernels/window_attention.cuh`, as is [`Segment`].
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(in super::super) struct Query {
    pub rows: HeadRows,
    /// Zeroed if none is lent: to all heads of a group or to none.
    pub lse: HeadRows,
    /// Rows of the window's first token.
    pub first: u32,
    pub lse_first: u32,
    pub unused: [u32; 2],
}

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(in super::super) struct Segment {
    pub row: u32,
    query: u32,
    pub group: u32,
    pub window: u32,
    tokens: u32,
    ends: u32,
    splits: u32,
    stride: u32,
    chunks: u32,
    scale: f32,
    stats: u64,
    planes: u64,
}

/// What the host knows of a KV head.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Head {
    /// Its number among keys, lengths and output rows.
    pub row: u32,
    /// The first of its group's heads among the [`Query`]s.
    pub query: u32,
    pub group: u32,
    /// Query rows that are used: at most as many as there are tokens, or as a probe has.
    pub window: u32,
    /// Tokens that the sequence has seen, and a probe's behind them; 0: as many as the head has slots, as far as the window
    /// can tell.
    pub tokens: u32,
    /// First of its entries in the table of ends: the past, what each query row sees, what each gives scores to. For
    /// heads whose slots are not positions.
    pub ends: Option<u32>,
    /// At most so many slots.
    pub longest: u32,
    pub dim: u32,
    pub dtype: Dtype,
    /// Whether a log-sum-exp comes with its queries.
    pub lse: bool,
}

/// Segments of one dtype and template, which are launched together.
#[derive(Debug)]
pub(in super::super) struct Part {
    pub template: Template,
    /// Where its segments begin, and their number.
    pub first: usize,
    pub count: usize,
    pub longest: u32,
    /// Query rows of a segment at most.
    pub rows: u32,
    /// Pass 1; none if every log-sum-exp is lent.
    pub sums: Option<Shape>,
    pub scores: Shape,
    /// Whether partial results are to be merged.
    pub merge: bool,
}

/// The kernel's variant, and the flag that tells 16-bit types apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in super::super) struct Template {
    pub variant: &'static str,
    pub flags: u32,
}

/// How a pass is launched: slots of a chunk, threads, blocks of rows.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Shape {
    pub threads: u32,
    pub blocks: u32,
    pub chunk: u32,
}

/// The launches of one operation, and the workspace they need.
pub(in super::super) struct Plan {
    pub(super) segments: Vec<Segment>,
    pub(super) parts: Vec<Part>,
    pub(super) flags: u32,
    pub(super) gap: u32,
    pub(super) radius: u32,
    /// Statistics of rows, of 16 bytes each, then floats of partial results.
    stats: u64,
    planes: u64,
}

impl Plan {
    /// `processors`: how many blocks run at once, about. Part of what results depend on.
    pub(in super::super) fn new(
        op: &WindowAttention,
        means: bool,
        heads: &[Head],
        processors: u32,
    ) -> Result<Self> {
        let kernel = op.row_pool.unwrap_or(1);
        limit("row pooling kernel on CUDA", kernel, POOL)?;
        let mut flags = 0;
        for (set, flag) in [
            (op.over_window == Reduce::Max, flags::WINDOW_MAX),
            (op.over_group == Reduce::Max, flags::GROUP_MAX),
            (op.score_window, flags::SCORE_WINDOW),
            (op.row_pool.is_some(), flags::POOLED),
            (means, flags::MEANS),
        ] {
            flags |= if set { flag } else { 0 };
        }
        let mut templates: Vec<(Template, Vec<Head>)> = Vec::new();
        for head in heads.iter().filter(|head| head.window > 0 && head.longest > 0) {
            if head.tokens == 0 && head.ends.is_none() && op.gap > 0 {
                return Err(Error::Unsupported {
                    what: "a gap without positions",
                    why: "the kernel cannot know which slots it leaves out",
                });
            }
            let template = Template::of(head)?;
            match templates.iter_mut().find(|(other, _)| *other == template) {
                Some((_, heads)) => heads.push(*head),
                None => templates.push((template, vec![*head])),
            }
        }
        let mut plan = Self {
            segments: Vec::new(),
            parts: Vec::new(),
            flags,
            gap: op.gap,
            radius: kernel / 2,
            stats: 0,
            planes: 0,
        };
        for (template, heads) in templates {
            plan.add(template, &heads, processors.into());
        }
        Ok(plan)
    }

    fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Units of a head, which are reduced each on its own, and their rows.
    fn units(&self, head: &Head) -> (u32, u32) {
        match self.has(flags::WINDOW_MAX) == self.has(flags::GROUP_MAX) {
            true => (1, head.group * head.window),
            false => (head.group, head.window),
        }
    }

    fn add(&mut self, template: Template, heads: &[Head], processors: u64) {
        let pooled = self.has(flags::POOLED);
        let most = |of: &dyn Fn(&Head) -> u32| heads.iter().map(of).max().unwrap_or(0);
        let longest = most(&|head| head.longest);
        let rows = most(&|head| head.group * head.window);

        // Pass 1, a block of rows for each 128 of them.
        let with_sums = |head: &&Head| pooled || !head.lse;
        let blocks = |head: &Head| (head.group * head.window).div_ceil(BLOCK_ROWS);
        let work = heads.iter().filter(with_sums).map(|head| slots(head) * u64::from(blocks(head)));
        let sums = (heads.iter().filter(with_sums).count() > 0).then(|| Shape {
            threads: rows.min(BLOCK_ROWS).next_multiple_of(WARP_ROWS),
            blocks: most(&blocks),
            chunk: chunk(work.sum(), processors),
        });

        // Pass 2: warps of a unit in a block, of a block, and units that a block has room for.
        let warps_of = |head: &Head| self.units(head).1.min(BLOCK_ROWS).div_ceil(WARP_ROWS);
        let warps = most(&|head| (self.units(head).0 * warps_of(head)).min(BLOCK_ROWS / WARP_ROWS));
        let room = |head: &Head| warps / warps_of(head);
        let large = |head: &Head| self.units(head).1 > BLOCK_ROWS;
        let blocks = |head: &Head| match large(head) {
            true => self.units(head).0,
            false => self.units(head).0.div_ceil(room(head)),
        };
        let work = heads.iter().map(|head| slots(head) * u64::from(blocks(head))).sum();
        let chunk = chunk(work, processors);
        // Long windows (all queries): a block goes through many blocks of rows and keeps running results. Enough of them to
        // even out that early slots are seen by more rows.
        let running =
            heads.iter().map(|head| slots(head).div_ceil(chunk.into()) * u64::from(blocks(head)));
        let wanted = (8 * processors).div_ceil(running.sum::<u64>().max(1)) as u32;
        let splits = |head: &Head| match large(head) {
            true => wanted.clamp(1, self.units(head).1.div_ceil(BLOCK_ROWS)),
            false => 1,
        };
        let direct = |head: &Head| {
            let pools_later = pooled && !self.has(flags::WINDOW_MAX);
            !large(head) && self.units(head).0 <= room(head) && !pools_later
        };

        let mut segments = Vec::with_capacity(heads.len());
        let (mut stats, mut planes) = (self.stats, self.planes);
        for head in heads {
            let stride = head.longest.next_multiple_of(8);
            segments.push(Segment {
                row: head.row,
                query: head.query,
                group: head.group,
                window: head.window,
                tokens: head.tokens,
                ends: head.ends.unwrap_or(u32::MAX),
                splits: splits(head),
                stride,
                chunks: head.dim * head.dtype.size() as u32 / 16,
                scale: (std::f64::consts::LOG2_E / f64::from(head.dim).sqrt()) as f32,
                stats,
                planes: if direct(head) { u64::MAX } else { planes },
            });
            if let (true, Some(sums)) = (with_sums(&head), sums) {
                let chunks = head.longest.div_ceil(sums.chunk);
                stats += u64::from(1 + chunks) * u64::from(head.group * head.window);
            }
            if !direct(head) {
                let beside = self.has(flags::MEANS) && (pooled || self.has(flags::WINDOW_MAX));
                let count = self.units(head).0 * splits(head) * if beside { 2 } else { 1 };
                planes += u64::from(count) * u64::from(stride);
            }
        }
        let scores = Shape {
            threads: warps * WARP_ROWS,
            blocks: most(&|head| blocks(head) * splits(head)),
            chunk,
        };
        let merge = heads.iter().any(|head| !direct(head));
        let (first, count) = (self.segments.len(), heads.len());
        self.parts.push(Part { template, first, count, longest, rows, sums, scores, merge });
        (self.stats, self.planes) = (stats, planes);
        self.segments.extend(segments);
    }

    /// To be on the device for [`launch`](super::launch).
    pub(in super::super) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Bytes that [`launch`](super::launch) needs, 16-byte aligned, contents undefined.
    pub(in super::super) fn workspace_bytes(&self) -> usize {
        self.stats_bytes() + (self.planes * 4) as usize
    }

    /// Of these, those of the rows' statistics.
    pub(in super::super) fn stats_bytes(&self) -> usize {
        (self.stats * 16) as usize
    }

    /// Its segments part by part.
    pub(in super::super) fn parts(&self) -> impl Iterator<Item = (&Part, &[Segment])> {
        self.parts.iter().map(|part| (part, &self.segments[part.first..part.first + part.count]))
    }
}

fn slots(head: &Head) -> u64 {
    head.longest.into()
}

/// Slots per block so that each processor gets two blocks.
fn chunk(slots: u64, processors: u64) -> u32 {
    slots.div_ceil(2 * processors).next_multiple_of(64).clamp(CHUNK, 1 << 30) as u32
}

impl Template {
    /// The smallest that a head fits in.
    fn of(head: &Head) -> Result<Self> {
        limit("head dim on CUDA", head.dim, DIM)?;
        let variant = match (head.dtype, head.dim) {
            (Dtype::F32, _) => "f32",
            (_, ..=64) => "64",
            (_, ..=128) => "128",
            _ => "256",
        };
        let flags = if head.dtype == Dtype::F16 { flags::HALF } else { 0 };
        Ok(Self { variant, flags })
    }
}

pub(in super::super) fn limit(what: &'static str, got: u32, limit: u32) -> Result<()> {
    match got <= limit {
        true => Ok(()),
        false => Err(Error::TooLarge { what, got: got.into(), limit: limit.into() }),
    }
}
