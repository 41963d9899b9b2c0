//! The race shadow of a region: cells that say who touched their bytes (see `records`), in pages.
//!
//! A page that was only ever touched as a whole, by copies and fills, is one cell. Otherwise its cells are as wide as
//! the narrowest access to it so far: 16 bytes at most, which most memory never leaves, down to one, because
//! neighbouring lanes may store the two halves of a word.

use super::Run;
use super::records::{Cell, Conflict, Records, Who};

/// Bytes of a page: a multiple of the widest access, small because gathers touch little of many pages.
const PAGE: u64 = 1024;

/// The widest cells, those of the widest access: 16 bytes.
const WIDEST: u32 = 4;

/// More distinct records than this are not worth keeping; a slot names at most 2^27.
const MOST: usize = 1 << 26;

#[derive(Debug)]
pub(super) struct Shadow {
    pages: Vec<Page>,
    records: Records,
    /// Unused records are dropped when there are this many.
    limit: usize,
}

#[derive(Debug)]
enum Page {
    Whole(Cell),
    /// Cells of `1 << shift` bytes.
    Cells {
        shift: u32,
        cells: Box<[Cell]>,
    },
}

impl Default for Shadow {
    fn default() -> Self {
        Self { pages: Vec::new(), records: Records::default(), limit: 1 << 20 }
    }
}

impl Shadow {
    /// Forgets everything but keeps the pages for the next block.
    pub(super) fn reset(&mut self) {
        for page in &mut self.pages {
            match page {
                Page::Whole(cell) => *cell = [0; 3],
                Page::Cells { cells, .. } => cells.fill([0; 3]),
            }
        }
        self.records.reset();
    }

    /// Checks a warp's access and enters it. Says whether a plain store met a strong write of its launch.
    pub(super) fn access(&mut self, run: Run, who: &Who<'_>) -> Result<bool, Conflict> {
        let mine = self.note(who);
        if run.same {
            // Two lanes stand for all.
            let last = run.lane + run.lanes - 1;
            self.touch(run.at, u64::from(run.width), (mine, run.lane, run.width), who)?;
            return self.touch(run.at, u64::from(run.width), (mine, last, run.width), who);
        }
        self.touch(run.at, run.bytes(), (mine, run.lane, run.width), who)
    }

    /// Enters a warp's write without a check. Its cells exist, from when it was announced.
    pub(super) fn settle(&mut self, run: Run, who: &Who<'_>) {
        let mine = self.note(who);
        for lane in 0..run.lanes {
            let at = run.at + u64::from(lane * run.width);
            if let Page::Cells { shift, cells } = &mut self.pages[(at / PAGE) as usize] {
                let first = ((at % PAGE) >> *shift) as usize;
                cells[first..first + (run.width >> *shift) as usize].fill([
                    mine | (run.lane + lane),
                    0,
                    0,
                ]);
            }
        }
    }

    /// The same for a copy or fill of any length.
    pub(super) fn host_access(
        &mut self,
        at: u64,
        bytes: u64,
        who: &Who<'_>,
    ) -> Result<(), Conflict> {
        let mine = self.note(who);
        self.touch(at, bytes, (mine, 0, 0), who).map(|_| ())
    }

    fn note(&mut self, who: &Who<'_>) -> u32 {
        if self.records.len() >= self.limit {
            self.compact();
        }
        self.records.note(who)
    }

    /// `as_whom`: slot value for lane 0, first lane, bytes per lane (0: one party for all bytes).
    fn touch(
        &mut self,
        at: u64,
        bytes: u64,
        as_whom: (u32, u32, u32),
        who: &Who<'_>,
    ) -> Result<bool, Conflict> {
        let (mine, first, width) = as_whom;
        let (end, mut from, mut met_strong) = (at + bytes, at, false);
        while from < end {
            let index = (from / PAGE) as usize;
            let to = end.min((index as u64 + 1) * PAGE);
            if index >= self.pages.len() {
                self.pages.resize_with(index + 1, || Page::Whole([0; 3]));
            }
            let page = &mut self.pages[index];
            let lane = first + ((from - at) as u32).checked_div(width).unwrap_or(0);
            let whole = to - from == PAGE && width == 0;
            if let (true, Page::Whole(cell)) = (whole, &mut *page) {
                self.records.touch(std::slice::from_mut(cell), mine, lane, 0, who)?;
            } else {
                // As narrow as the ends and the lanes are.
                let narrow = from | to | u64::from(width) | 1 << WIDEST;
                let (shift, cells) = page.cells(narrow.trailing_zeros());
                let start = from % PAGE;
                let range = (start >> shift) as usize..((start + to - from) >> shift) as usize;
                let per_lane = width.checked_ilog2().map_or(u32::BITS - 1, |wide| wide - shift);
                met_strong |= self.records.touch(&mut cells[range], mine, lane, per_lane, who)?;
                if whole {
                    page.merge();
                }
            }
            from = to;
        }
        Ok(met_strong)
    }

    fn compact(&mut self) {
        let mut used = vec![false; self.records.len()];
        self.slots(|slot| used[(*slot >> 5) as usize] = true);
        let numbers = self.records.compact(&used);
        if self.records.len() > MOST {
            self.reset();
        } else {
            self.slots(|slot| *slot = numbers[(*slot >> 5) as usize] << 5 | *slot & 31);
        }
        self.limit = self.limit.max(2 * self.records.len());
    }

    fn slots(&mut self, mut each: impl FnMut(&mut u32)) {
        for page in &mut self.pages {
            match page {
                Page::Whole(cell) => cell.iter_mut().for_each(&mut each),
                Page::Cells { cells, .. } => {
                    cells.as_flattened_mut().iter_mut().for_each(&mut each)
                }
            }
        }
    }
}

impl Page {
    /// The page's cells, of at most `1 << shift` bytes.
    fn cells(&mut self, shift: u32) -> (u32, &mut [Cell]) {
        match self {
            Self::Whole(cell) => {
                let cells = vec![*cell; PAGE as usize >> shift].into();
                *self = Self::Cells { shift, cells };
            }
            Self::Cells { shift: now, cells } if *now > shift => {
                let times = 1 << (*now - shift);
                *cells = cells.iter().flat_map(|cell| std::iter::repeat_n(*cell, times)).collect();
                *now = shift;
            }
            Self::Cells { .. } => {}
        }
        match self {
            Self::Cells { shift, cells } => (*shift, cells),
            Self::Whole(_) => unreachable!("made cells above"),
        }
    }

    /// One cell again, if all are alike.
    fn merge(&mut self) {
        if let Self::Cells { cells, .. } = self
            && cells.iter().all(|cell| *cell == cells[0])
        {
            *self = Self::Whole(cells[0]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{OpOrder, Order, records};
    use super::*;

    fn host(op: &OpOrder, write: bool) -> Who<'_> {
        let order = Order::Weak;
        Who { op, view: None, warp: records::HOST, inst: 0, write, order, non_coherent: false }
    }

    #[test]
    fn records_that_no_cell_names_are_dropped_and_the_others_keep_their_meaning() {
        let mut shadow = Shadow { limit: 8, ..Shadow::default() };
        let first = OpOrder::new(0, 0, 1, vec![]);
        shadow.host_access(4096, 4, &host(&first, true)).unwrap();
        for op in 1..1000 {
            let op = OpOrder::new(op, 1, op, vec![1, op - 1]);
            shadow.host_access(0, 2000, &host(&op, true)).unwrap();
        }
        assert!(shadow.records.len() <= 8, "{} records for 2 in use", shadow.records.len());
        let conflict = shadow
            .host_access(4096, 4, &host(&OpOrder::new(1000, 2, 1, vec![0]), false))
            .unwrap_err();
        assert_eq!(conflict.other_op, 0);
    }

    #[test]
    fn a_page_written_as_a_whole_is_one_cell_again() {
        let mut shadow = Shadow::default();
        let op = OpOrder::new(0, 0, 1, vec![1]);
        shadow.host_access(3, 5, &host(&op, true)).unwrap();
        assert!(matches!(&shadow.pages[0], Page::Cells { shift: 0, .. }));
        shadow.host_access(0, 2 * PAGE, &host(&op, true)).unwrap();
        assert!(shadow.pages.iter().all(|page| matches!(page, Page::Whole(_))));
    }
}
