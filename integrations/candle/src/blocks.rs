//! Reading a prompt block by block: after each block the cache is back at its budget.
//!
//! Any policy will do. One that looks with a probe (`epicache`) has the probe run over the cache after every block that
//! does not fit; others score by the block's own queries, while it is read.

use candle_core::{Result, bail};

use crate::attention::AttentionHook;
use crate::cache::BudgetCache;
use crate::reconstruct::Forward;

/// Reads `ids` into a sequence, `block` tokens at once. `probe`: tokens of the probe, at the positions that follow the block;
/// may be empty if the policy asks for none.
///
/// Costs the prefill, and with a probe its tokens once more for every block that does not fit.
///
/// Errors: no tokens in a block, no probe where one is asked for, and those of `forward`.
pub fn read_blocks(
    cache: &mut BudgetCache,
    sequence: usize,
    ids: &[u32],
    block: usize,
    probe: &[u32],
    forward: &mut Forward<'_>,
) -> Result<()> {
    if block == 0 || (cache.wants_probe() && probe.is_empty()) {
        let (block, probe) = (block, probe.len());
        bail!(
            "{:?} in blocks of {block} with a probe of {probe}: expected more",
            cache.policy().name
        );
    }
    for block in ids.chunks(block) {
        if !cache.wants_probe() {
            let spans = one(cache, sequence, block);
            let mut hook = cache.compressing();
            forward(block, &spans, &mut hook as &mut dyn AttentionHook)?;
            hook.finish()?;
            continue;
        }
        forward(block, &one(cache, sequence, block), cache)?;
        if cache.is_over_budget(sequence)? {
            let spans = one(cache, sequence, probe);
            let mut hook = cache.probing();
            forward(probe, &spans, &mut hook as &mut dyn AttentionHook)?;
            hook.finish()?;
        }
    }
    Ok(())
}

/// Spans of a pass in which one sequence has tokens.
fn one(cache: &BudgetCache, sequence: usize, ids: &[u32]) -> Vec<crate::Span> {
    let tokens = |i| if i == sequence { ids.len() as u32 } else { 0 };
    cache.spans(&(0..cache.sequences().len()).map(tokens).collect::<Vec<_>>())
}
