//! Selections to read: small enough to check by eye, one sentence each.

use std::ops::Range;

use kvbudget::backend::ops::Contest;

use super::top_k::Problem;
use crate::data::TestDevice;

struct Golden {
    name: &'static str,
    scores: &'static [&'static [f32]],
    /// One contest over all segments.
    budget: u64,
    /// Empty: no floors.
    floors: &'static [u64],
    /// Empty: nothing protected.
    protected: &'static [&'static [Range<u32>]],
    keep: &'static [&'static [u32]],
}

const NAN: f32 = f32::NAN;
const INF: f32 = f32::INFINITY;

#[expect(clippy::single_range_in_vec_init, reason = "one range is what most of them protect")]
const GOLDEN: &[Golden] = &[
    Golden {
        name: "ties go to the smaller position, protection comes first",
        scores: &[&[0.5, 0.5, 0.5, NAN, 0.9, 0.5]],
        budget: 3,
        floors: &[],
        protected: &[&[0..1]],
        keep: &[&[0, 1, 4]],
    },
    Golden {
        name: "a protected NaN beats any score",
        scores: &[&[0.5, INF, 0.5, NAN, 0.9, 0.5]],
        budget: 2,
        floors: &[],
        protected: &[&[3..4]],
        keep: &[&[1, 3]],
    },
    Golden {
        name: "among protected slots the position decides, not the score",
        scores: &[&[0.1, 0.3, 0.2, 0.9, 0.8]],
        budget: 2,
        floors: &[],
        protected: &[&[0..3]],
        keep: &[&[0, 1]],
    },
    Golden {
        name: "protection that overlaps the cut: one protected slot is left out, no other enters",
        scores: &[&[0.1, 0.9, 0.1, 0.9, 0.1]],
        budget: 2,
        floors: &[],
        protected: &[&[0..1, 2..3, 4..5]],
        keep: &[&[0, 2]],
    },
    Golden {
        name: "minus zero equals plus zero",
        scores: &[&[-0.0, 0.0, -0.0, 0.0, -1.0]],
        budget: 3,
        floors: &[],
        protected: &[],
        keep: &[&[0, 1, 2]],
    },
    Golden {
        name: "minus infinity beats NaN of either sign",
        scores: &[&[NAN, -NAN, -INF, NAN]],
        budget: 2,
        floors: &[],
        protected: &[],
        keep: &[&[0, 2]],
    },
    Golden {
        name: "a subnormal is more than zero, a negative one less",
        scores: &[&[-1e-45, 0.0, 1e-45, -0.0]],
        budget: 3,
        floors: &[],
        protected: &[],
        keep: &[&[1, 2, 3]],
    },
    Golden {
        name: "kept slots ascend, however they rank",
        scores: &[&[1.0, 2.0, 3.0, 4.0]],
        budget: 3,
        floors: &[],
        protected: &[],
        keep: &[&[1, 2, 3]],
    },
    Golden {
        name: "segments compete; of equal scores the first segment's comes first",
        scores: &[&[0.5, 0.1], &[0.5, 0.9], &[0.5]],
        budget: 2,
        floors: &[],
        protected: &[],
        keep: &[&[0], &[1], &[]],
    },
    Golden {
        name: "a tie between segments goes to the segment before the slot",
        scores: &[&[0.1, 0.1, 0.5], &[0.5, 0.1, 0.1]],
        budget: 1,
        floors: &[],
        protected: &[],
        keep: &[&[2], &[]],
    },
    Golden {
        name: "a floor keeps the best of a segment that loses everywhere",
        scores: &[&[0.9, 0.8, 0.7], &[0.1, 0.2, 0.3]],
        budget: 3,
        floors: &[0, 1],
        protected: &[],
        keep: &[&[0, 1], &[2]],
    },
    Golden {
        name: "a floor that is won anyway takes nothing from the rest",
        scores: &[&[0.9, 0.8, 0.7], &[0.1, 0.2, 0.3]],
        budget: 3,
        floors: &[2, 0],
        protected: &[],
        keep: &[&[0, 1, 2], &[]],
    },
    Golden {
        name: "floors that are the whole budget leave no contest",
        scores: &[&[0.9, 0.8, 0.7], &[0.1, 0.2, 0.3]],
        budget: 3,
        floors: &[1, 2],
        protected: &[],
        keep: &[&[0], &[1, 2]],
    },
    Golden {
        name: "protection competes across segments, after floors",
        scores: &[&[0.9, 0.8], &[0.1, 0.2], &[0.4, 0.3]],
        budget: 3,
        floors: &[1, 0, 0],
        protected: &[&[], &[0..1], &[1..2]],
        keep: &[&[0], &[0], &[1]],
    },
    Golden {
        name: "a budget of nothing keeps nothing, protected or not",
        scores: &[&[0.9, 0.8], &[]],
        budget: 0,
        floors: &[],
        protected: &[&[0..2], &[]],
        keep: &[&[], &[]],
    },
    Golden {
        name: "a budget of everything keeps everything, NaN too",
        scores: &[&[0.9, NAN], &[], &[-INF]],
        budget: 3,
        floors: &[],
        protected: &[],
        keep: &[&[0, 1], &[], &[0]],
    },
];

/// Each golden selection, by the backend and by the oracle that judges it elsewhere.
pub fn cases<D: TestDevice>(device: &D) {
    for golden in GOLDEN {
        let segments = golden.scores.len();
        let floors =
            if golden.floors.is_empty() { vec![0; segments] } else { golden.floors.to_vec() };
        let protected = (0..segments)
            .map(|s| golden.protected.get(s).map_or(vec![], |ranges| ranges.to_vec()))
            .collect();
        let problem = Problem {
            scores: golden.scores.iter().map(|row| row.to_vec()).collect(),
            contests: vec![Contest { segments: 0..segments, budget: golden.budget, floors }],
            protected,
        };
        let keep: Vec<Vec<u32>> = golden.keep.iter().map(|row| row.to_vec()).collect();
        assert_eq!(problem.want(), keep, "the oracle on {}", golden.name);
        problem.check(device, &golden.name);
    }
}
