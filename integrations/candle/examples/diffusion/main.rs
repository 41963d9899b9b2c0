//! MaskKV on a small random diffusion model: what an evicted prompt, and a cache that is not always refreshed, cost in its output.
//!
//! The dense model denoises; the others are told its tokens, and their logits of the masks are compared with its own, step by step.

mod against_dense;
mod model;

use anyhow::Result;
use clap::Parser;
use kvbudget::allocate::Layers;
use kvbudget::{Budget, LayerProfile, RefreshPolicy, preset};
use kvbudget_candle::diffusion::{Options, importance};
use kvbudget_candle::qwen3::Qwen3;

use against_dense::{Dense, Followed};
use model::{MASK, model, prompt};

/// Compare evicted prompts and refreshes with dense denoising
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Models and prompts
    #[arg(long, default_value_t = 8)]
    seeds: u64,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 192)]
    prompt: usize,
    /// Masks, each decoded in a step of its own
    #[arg(long, default_value_t = 32)]
    masks: usize,
    /// Prompt slots kept per head
    #[arg(long, default_value_t = 32)]
    keep: u64,
    /// Steps from one refresh of the prompt to the next
    #[arg(long, default_value_t = 50)]
    prompt_every: u32,
    /// Steps from one refresh of the response to the next, where it is not computed in every step
    #[arg(long, default_value_t = 5)]
    response_every: u32,
}

/// A line of a table: a way to denoise, and how it did with each seed.
struct Row {
    name: &'static str,
    options: Options,
    followed: Vec<Followed>,
}

impl Row {
    fn new(
        name: &'static str,
        policy: &str,
        budget: Budget,
        refresh: RefreshPolicy,
    ) -> kvbudget::Result<Self> {
        let mut policy = preset(policy)?;
        policy.set("protect_spans", "mask,decoded")?;
        let options = Options { policy, budget, refresh, mask: MASK };
        Ok(Self { name, options, followed: Vec::new() })
    }

    fn run(&mut self, model: &Qwen3, profile: &LayerProfile, dense: &Dense) -> Result<()> {
        let mut options = self.options.clone();
        if let Layers::Boundary(_) = options.policy.layers {
            profile.apply(&mut options.policy)?;
        }
        self.followed.push(dense.follow(model, options)?);
        Ok(())
    }

    fn print(&self) {
        let seeds = self.followed.len() as f64;
        let mean = |of: fn(&Followed) -> f64| self.followed.iter().map(of).sum::<f64>() / seeds;
        let errors: Vec<f64> = self.followed.iter().map(Followed::mean_error).collect();
        let worst = errors.iter().copied().fold(0.0, f64::max);
        println!(
            "| {} | {:.3} | {worst:.3} | {:.0} |",
            self.name,
            mean(Followed::mean_error),
            mean(|f| f.rows),
        );
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let few = Budget::TokensPerHead(args.keep + args.masks as u64);
    let all = Budget::keep(1, 1)?;
    let fresh = RefreshPolicy::new(args.prompt_every, 1)?;
    let due = RefreshPolicy::new(args.prompt_every, args.response_every)?;
    let often = RefreshPolicy::new(args.response_every, args.response_every)?;
    // What is evicted, with a response that is computed in every step; then when it is computed again.
    let mut rows = vec![
        Row::new("nothing evicted", "maskkv", all, fresh)?,
        Row::new("`maskkv`", "maskkv", few, fresh)?,
        Row::new("`keydiff`", "keydiff", few, fresh)?,
        Row::new("`knorm`", "knorm", few, fresh)?,
        Row::new("`streaming`", "streaming", few, fresh)?,
        Row::new("`random`", "random", few, fresh)?,
        Row::new("`maskkv`, response when due", "maskkv", few, due)?,
        Row::new("… and nothing between", "maskkv", few, due.with_share("0".parse()?))?,
        Row::new("`maskkv`, prompt as often", "maskkv", few, often)?,
        Row::new("… and selected once", "maskkv", few, often.selecting_once())?,
    ];
    for seed in 0..args.seeds {
        eprintln!("seed {seed}");
        let model = model(seed, 4)?;
        let other = |i: u64| [prompt(1000 + i, args.prompt), vec![MASK; args.masks]].concat();
        let profile = importance("random", &model, &[0, 1, 2, 3].map(other))?;
        let dense = Dense::run(&model, &prompt(seed, args.prompt), args.masks)?;
        rows.iter_mut().try_for_each(|row| row.run(&model, &profile, &dense))?;
    }
    println!("| | error | worst seed | rows per step |");
    println!("|---|---|---|---|");
    rows.iter().for_each(Row::print);
    Ok(())
}
