//! When a diffusion decoder computes again what it has cached: the schedule that MaskKV (arXiv 2510.09309) runs on, dLLM-Cache's.
//!
//! Attention goes both ways there, so every decoded token changes the keys and values of all others, a little. The decoder
//! uses them for some steps regardless:
//!
//! ```text
//! step       0     1     2     3     4     5     6     …     50
//! prompt     all                                             all
//! selection  made                                            made again
//! response   all   moved moved moved moved all   moved …     all
//! ```
//!
//! *Moved* rows are those whose new value is least like the one in the cache: values cost one product per layer and tell which
//! rows are worth the rest. A refresh of the prompt takes the response along: prompt rows look at it, and its masks vote on what
//! is kept. Whether a refresh votes again the paper does not say; here it does, unless told otherwise.

use crate::budget::Fraction;
use crate::error::{Error, Result};

/// After how many steps what is computed again.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RefreshPolicy {
    prompt_every: u32,
    response_every: u32,
    share: Fraction,
    delta: Option<f64>,
    select_once: bool,
}

/// What one step computes again. Of the response, if not all of it, the rows that [`RefreshPolicy::moved`] names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refresh {
    /// All rows of the prompt.
    pub prompt: bool,
    /// All rows of the response.
    pub response: bool,
    /// Which slots stay is decided, from this step's queries. Where the prompt is refreshed without, those at the positions kept
    /// before are taken from the new rows.
    pub select: bool,
}

impl Default for RefreshPolicy {
    /// The paper's: 50 and 5 steps, and a quarter of the response in between.
    fn default() -> Self {
        let share = Fraction::new(1, 4).unwrap_or_default();
        Self { prompt_every: 50, response_every: 5, share, delta: None, select_once: false }
    }
}

impl RefreshPolicy {
    /// The prompt after so many steps (`T_p`), the response after so many (`T_r`).
    ///
    /// Errors: 0 of either.
    pub fn new(prompt_every: u32, response_every: u32) -> Result<Self> {
        for (what, steps) in [
            ("steps between refreshes of the prompt", prompt_every),
            ("steps between refreshes of the response", response_every),
        ] {
            if steps == 0 {
                return Err(Error::Zero { what });
            }
        }
        Ok(Self { prompt_every, response_every, ..Self::default() })
    }

    /// Between refreshes, computes at most this part of the response again, rounded down: those that moved most.
    pub fn with_share(self, share: Fraction) -> Self {
        Self { share, ..self }
    }

    /// Between refreshes, leaves rows alone whose values have a cosine of at least `delta` with those in the cache.
    ///
    /// Errors: not a cosine.
    pub fn with_delta(self, delta: f64) -> Result<Self> {
        if !(-1.0..=1.0).contains(&delta) {
            let (name, expected) = ("delta", "a cosine from -1 to 1");
            return Err(Error::Parameter { name, expected, got: delta.to_string() });
        }
        Ok(Self { delta: Some(delta), ..self })
    }

    /// Keeps the positions that the first step has selected.
    pub fn selecting_once(self) -> Self {
        Self { select_once: true, ..self }
    }

    /// What step `step` computes again; the first is 0 and computes everything.
    pub fn at(&self, step: u32) -> Refresh {
        let prompt = step.is_multiple_of(self.prompt_every);
        Refresh {
            prompt,
            response: prompt || step.is_multiple_of(self.response_every),
            select: step == 0 || prompt && !self.select_once,
        }
    }

    /// Rows to compute again in a step that does not refresh the response, ascending. `cosines`: of each row's value with the one
    /// in the cache; NaN, where nothing is known, counts as having moved most.
    pub fn moved(&self, cosines: &[f64]) -> Vec<u32> {
        let known = |row: &u32| Some(cosines[*row as usize]).filter(|cosine| !cosine.is_nan());
        let below = |row: &u32| match (known(row), self.delta) {
            (Some(cosine), Some(delta)) => cosine < delta,
            _ => true,
        };
        let mut rows: Vec<u32> = (0..cosines.len() as u32).filter(below).collect();
        let like = |row: &u32| known(row).unwrap_or(f64::NEG_INFINITY);
        rows.sort_by(|a, b| like(a).total_cmp(&like(b)));
        rows.truncate(self.share.of(cosines.len() as u64) as usize);
        rows.sort_unstable();
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(policy: RefreshPolicy, of: impl Fn(Refresh) -> bool) -> Vec<u32> {
        (0..120).filter(|&step| of(policy.at(step))).collect()
    }

    #[test]
    fn the_papers_schedule() {
        let policy = RefreshPolicy::default();
        assert_eq!(policy, RefreshPolicy::new(50, 5).unwrap());
        assert_eq!(steps(policy, |r| r.prompt), [0, 50, 100]);
        assert_eq!(steps(policy, |r| r.select), [0, 50, 100]);
        assert!(steps(policy, |r| r.response).into_iter().eq((0..120).step_by(5)));
        let once = policy.selecting_once();
        assert_eq!(steps(once, |r| r.prompt), [0, 50, 100]);
        assert_eq!(steps(once, |r| r.select), [0]);
    }

    /// The prompt never comes alone.
    #[test]
    fn steps_that_do_not_divide_each_other() {
        let policy = RefreshPolicy::new(50, 20).unwrap();
        assert_eq!(steps(policy, |r| r.prompt), [0, 50, 100]);
        assert_eq!(steps(policy, |r| r.response), [0, 20, 40, 50, 60, 80, 100]);
        let always = RefreshPolicy::new(1, u32::MAX).unwrap();
        assert!(steps(always, |r| r.prompt && r.response && r.select).into_iter().eq(0..120));
    }

    #[test]
    fn what_moved_most_comes_first() {
        let cosines = [0.9, 0.2, 1.0, 0.5, 0.9, 0.7, 1.0, 0.95, 0.3];
        let quarter = RefreshPolicy::default();
        assert_eq!(quarter.moved(&cosines), [1, 8]);
        let half = quarter.with_share("1/2".parse().unwrap());
        assert_eq!(half.moved(&cosines), [1, 3, 5, 8]);
        assert_eq!(half.with_delta(0.5).unwrap().moved(&cosines), [1, 8]);
        let all = quarter.with_share("1".parse().unwrap());
        assert!(all.moved(&cosines).into_iter().eq(0..9));
        assert_eq!(all.with_delta(0.9).unwrap().moved(&cosines), [1, 3, 5, 8]);
        assert_eq!(all.with_delta(-1.0).unwrap().moved(&cosines), [0; 0]);
        assert_eq!(quarter.with_share(Fraction::ZERO).moved(&cosines), [0; 0]);
        // Ties go to the lower row; what is not known moves first, whatever delta is.
        assert_eq!(quarter.moved(&[0.5; 8]), [0, 1]);
        let unknown = [0.0, 1.0, f64::NAN, 0.5];
        assert_eq!(quarter.with_delta(-1.0).unwrap().moved(&unknown), [2]);
        assert_eq!(quarter.moved(&[]), [0; 0]);
    }

    #[test]
    fn nonsense_is_refused() {
        let error = |result: Result<RefreshPolicy>| result.unwrap_err().to_string();
        assert!(error(RefreshPolicy::new(0, 5)).contains("prompt"));
        assert!(error(RefreshPolicy::new(50, 0)).contains("response"));
        for delta in [1.5, -1.5, f64::NAN] {
            assert!(error(RefreshPolicy::default().with_delta(delta)).contains("cosine"));
        }
    }
}
