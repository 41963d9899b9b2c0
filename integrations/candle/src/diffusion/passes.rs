//! The two passes of a step: over prompt and response, with a selection of what stays, or over the response alone.

use candle_core::{Error, Result, Tensor, bail};
use kvbudget::backend::cpu::{Cpu, HostLayer};
use kvbudget::cache::FlatCache;
use kvbudget::{LayerId, Plan, Planner, Position, Ragged, Sequence};

use super::Denoiser;
use super::bidirectional::{Pass, attend, cosines, lend, replaced};
use crate::attention::Span;
use crate::host::Lent;

/// What a layer holds between steps: `R` rows of the response where nothing else is said.
pub(super) struct Layer {
    /// What is kept of the prompt, then the response.
    pub(super) cache: FlatCache,
    /// `[R, H, D]`
    k: Tensor,
    v: Tensor,
    /// `[R, hidden]`
    attention: Tensor,
    mlp: Tensor,
}

impl Layer {
    /// Puts keys and values of some rows of the response, which follows `first` tokens, in the place of the old ones.
    fn put(&mut self, first: u32, rows: &[u32], k: &Tensor, v: &Tensor) -> Result<()> {
        (self.k, self.v) = (replaced(&self.k, k, rows)?, replaced(&self.v, v, rows)?);
        self.cache.truncate(first).map_err(Error::wrap)?;
        let (k, v) = (Lent::new(&self.k)?, Lent::new(&self.v)?);
        self.cache.append(&k.all_tokens()?, &v.all_tokens()?).map_err(Error::wrap)
    }
}

/// How a run over everything knows what to keep.
enum Selection<'a> {
    Voting(Planner<'a, Cpu>),
    /// As it was kept before.
    Made(Plan),
}

impl Selection<'_> {
    /// Positions that a layer keeps, as far as that is settled.
    fn keep(&mut self, layer: usize, view: &HostLayer<'_>) -> kvbudget::Result<Ragged<Position>> {
        match self {
            Self::Made(plan) => Ok(plan.layers[layer].clone()),
            Self::Voting(planner) => {
                planner.push(&[*view])?;
                Ok(planner.held(0, LayerId(layer as u32)).unwrap_or_default())
            }
        }
    }

    fn finish(self) -> kvbudget::Result<Plan> {
        match self {
            Self::Made(plan) => Ok(plan),
            Self::Voting(planner) => Ok(planner.finish()?.remove(0)),
        }
    }
}

impl Denoiser<'_> {
    /// Runs prompt and response, and evicts each layer as soon as it has attended. The response's rows behind the last layer.
    pub(super) fn run_all(
        &mut self,
        masks: &[u32],
        select: bool,
    ) -> Result<(Tensor, Vec<Vec<u32>>)> {
        self.layers.clear();
        let made = self.plan.take().filter(|_| !select);
        let Self { model, cpu, policy, options, prompt, response, .. } = &*self;
        let (geometry, first, rows) = (model.geometry(), prompt.len(), response.len());
        let ids = [prompt.as_slice(), response].concat();
        let spans = self.spans()?;
        let mut selection = match made {
            Some(plan) => Selection::Made(plan),
            None => {
                let sequence = Sequence { spans: Some(&spans), ..(ids.len() as u32).into() };
                let planner = Planner::new(cpu, policy, geometry, options.budget, &[sequence]);
                Selection::Voting(planner.map_err(Error::wrap)?)
            }
        };

        let turns = model.turns(ids.len(), &[Span::new(0, ids.len() as u32)])?;
        let mut x = model.embed(&ids)?;
        let voters: Vec<u32> = masks.iter().map(|row| first as u32 + row).collect();
        let voters = Tensor::new(voters, x.device())?;
        // A copy: a view would keep the prompt's rows alive.
        let of_response = |x: &Tensor| x.narrow(0, first, rows)?.copy();
        let mut layers = Vec::new();
        for (index, (layer, &shape)) in model.layers().iter().zip(geometry.layers()).enumerate() {
            let pass = Pass::run(layer, shape, cpu, &x, &turns)?;
            x = ((x + &pass.attention)? + &pass.mlp)?;
            let probe = pass.q.index_select(&voters, 0)?;
            let cache = lend(shape, &pass.k, &pass.v, |view| {
                let probe = Lent::new(&probe)?;
                let gather = |view: HostLayer<'_>| {
                    FlatCache::gather(&view, &selection.keep(index, &view)?, 0)
                };
                view.with_probe(probe.all_tokens()?).and_then(gather).map_err(Error::wrap)
            })?;
            let (k, v) = (of_response(&pass.k)?, of_response(&pass.v)?);
            let (attention, mlp) = (of_response(&pass.attention)?, of_response(&pass.mlp)?);
            layers.push(Layer { cache, k, v, attention, mlp });
        }
        let plan = selection.finish().map_err(Error::wrap)?;
        for (layer, kept) in layers.iter_mut().zip(&plan.layers) {
            // Layers that contest a budget have waited for the last.
            layer.cache.compact(kept).map_err(Error::wrap)?;
            let of_prompt = |head: &Vec<Position>| head.partition_point(|p| p.index() < first);
            if layer.cache.positions().iter().any(|head| head.len() - of_prompt(head) < rows) {
                bail!("{:?} has evicted some of the response: protect its spans", plan.policy);
            }
        }
        (self.layers, self.plan) = (layers, Some(plan));
        let all = (0..rows as u32).collect();
        Ok((x.narrow(0, first, rows)?, vec![all; self.layers.len()]))
    }

    /// Runs rows of the response over what is kept of the prompt: all, or in each layer those whose values have moved.
    pub(super) fn run_response(&mut self, all: bool) -> Result<(Tensor, Vec<Vec<u32>>)> {
        let Self { model, cpu, options, prompt, response, layers, .. } = self;
        let first = prompt.len() as u32;
        let mut x = model.embed(response)?;
        let mut computed = Vec::new();
        let shapes = model.geometry().layers();
        for ((layer, &shape), cached) in model.layers().iter().zip(shapes).zip(layers) {
            let normed = layer.normed(&x)?;
            let v = layer.values(&normed)?;
            let rows = match all {
                true => (0..response.len() as u32).collect(),
                false => options.refresh.moved(&cosines(&v, &cached.v)?),
            };
            if !rows.is_empty() {
                let at = Tensor::new(rows.as_slice(), x.device())?;
                let of_rows = |x: &Tensor| x.index_select(&at, 0);
                let positions: Vec<Span> = rows.iter().map(|r| Span::new(first + r, 1)).collect();
                let turns = model.turns(rows.len(), &positions)?;
                let (q, k) = layer.queries_and_keys(&of_rows(&normed)?, &turns)?;
                cached.put(first, &rows, &k, &of_rows(&v)?)?;
                let attended = attend(cpu, &cached.cache.view(shape).map_err(Error::wrap)?, &q)?;
                cached.attention =
                    replaced(&cached.attention, &layer.attention(&attended)?, &rows)?;
                let after = of_rows(&(&x + &cached.attention)?)?;
                cached.mlp = replaced(&cached.mlp, &layer.mlp(&after)?, &rows)?;
            }
            x = ((x + &cached.attention)? + &cached.mlp)?;
            computed.push(rows);
        }
        Ok((x, computed))
    }
}
