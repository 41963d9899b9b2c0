//! Many sequences that read and write together.

use anyhow::Result;
use candle_core::Tensor;
use kvbudget_candle::{BudgetCache, SequenceCache};

use super::Bench;

/// Compressed caches of one context, each with its own variant.
pub struct Batch<'b> {
    bench: &'b Bench,
    cache: BudgetCache,
}

impl<'b> Batch<'b> {
    pub fn new(
        bench: &'b Bench,
        sequences: impl IntoIterator<Item = SequenceCache>,
    ) -> Result<Self> {
        let mut cache = bench.cache()?;
        for sequence in sequences {
            cache.push_sequence(sequence);
        }
        Ok(Self { bench, cache })
    }

    pub fn len(&self) -> usize {
        self.cache.sequences().len()
    }

    pub fn hook(&mut self) -> &mut BudgetCache {
        &mut self.cache
    }

    /// Every sequence reads the same `ids`. Returns hidden states `[sequences, ids, hidden]`.
    pub fn read(&mut self, ids: &[u32]) -> Result<Tensor> {
        let spans = self.cache.spans(&vec![ids.len() as u32; self.len()]);
        let hidden = self.bench.model.forward(&ids.repeat(self.len()), &spans, &mut self.cache)?;
        Ok(hidden.reshape((self.len(), ids.len(), ()))?)
    }

    /// Every sequence reads its prompt and continues it greedily by at most `count` tokens, until it is `done`. The
    /// last token is not read.
    pub fn answer(
        &mut self,
        mut prompts: Vec<Vec<u32>>,
        count: usize,
        done: impl Fn(&[u32]) -> Result<bool>,
    ) -> Result<Vec<Vec<u32>>> {
        let mut written = vec![Vec::new(); self.len()];
        for _ in 0..count {
            let tokens: Vec<u32> = prompts.iter().map(|ids| ids.len() as u32).collect();
            if tokens.iter().all(|&n| n == 0) {
                break;
            }
            let spans = self.cache.spans(&tokens);
            let hidden = self.bench.model.forward(&prompts.concat(), &spans, &mut self.cache)?;
            // The last row of each sequence that read something.
            let ends = tokens.iter().scan(0, |end, &n| {
                *end += n;
                Some((n, *end))
            });
            let last: Vec<u32> = ends.filter(|(n, _)| *n > 0).map(|(_, end)| end - 1).collect();
            let last = hidden.index_select(&Tensor::new(last, hidden.device())?, 0)?;
            let next = self.bench.model.logits(&last)?.argmax(1)?.to_vec1::<u32>()?;
            let active = prompts.iter_mut().zip(&mut written).filter(|(ids, _)| !ids.is_empty());
            for ((prompt, written), id) in active.zip(next) {
                prompt.clear();
                written.push(id);
                if !done(written)? {
                    prompt.push(id);
                }
            }
        }
        Ok(written)
    }
}
