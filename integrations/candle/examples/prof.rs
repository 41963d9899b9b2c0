use candle_core::Tensor;
use candle_core::quantized::gguf_file::Content;
use kvbudget_candle::*;
use std::fs::File;
use std::time::Instant;
struct Timed<A>(A, f64);
impl<A: AttentionHook> AttentionHook for Timed<A> {
    fn attend(
        &mut self,
        l: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        s: &[Span],
    ) -> candle_core::Result<Tensor> {
        let t = Instant::now();
        let r = self.0.attend(l, q, k, v, s);
        self.1 += t.elapsed().as_secs_f64();
        r
    }
}
struct Nothing;
impl AttentionHook for Nothing {
    fn attend(
        &mut self,
        _: usize,
        q: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &[Span],
    ) -> candle_core::Result<Tensor> {
        Ok(q.clone())
    }
}
fn main() -> anyhow::Result<()> {
    let path = std::env::args().nth(1).unwrap();
    let n: u32 = std::env::args().nth(2).unwrap().parse()?;
    let mut file = File::open(path)?;
    let content = Content::read(&mut file)?;
    let m = Llama::load(&content, &mut file)?;
    let text = std::fs::read_to_string("prose/alice-chapters-1-2.txt")?;
    let ids = tokenizer::encode(&tokenizer::from_gguf(&content)?, &text)?;
    let ids = &ids[..n as usize];
    for _ in 0..2 {
        let t = Instant::now();
        m.forward(ids, &[Span::new(0, n)], &mut Nothing)?;
        println!("no attention {:.3}", t.elapsed().as_secs_f64());
        let mut h = Timed(DenseAttention::new(30), 0.0);
        let t = Instant::now();
        let a = m.forward(ids, &[Span::new(0, n)], &mut h)?;
        println!("dense {:.3} attention {:.3}", t.elapsed().as_secs_f64(), h.1);
        h.1 = 0.0;
        let t = Instant::now();
        for i in 0..16 {
            m.logits(&m.forward(&[ids[i]], &[Span::new(n + i as u32, 1)], &mut h)?)?;
        }
        println!("dense decode {:.4} attention {:.4}", t.elapsed().as_secs_f64() / 16., h.1 / 16.);
        let mut c = BudgetCache::new(
            m.geometry()?,
            m.output_projections(),
            kvbudget::preset("ada-snapkv")?,
            "20%".parse()?,
        )?;
        c.add_sequence()?;
        let mut h = Timed(c, 0.0);
        let t = Instant::now();
        let b = m.forward(ids, &[Span::new(0, n)], &mut h)?;
        println!("budget {:.3} attention {:.3}", t.elapsed().as_secs_f64(), h.1);
        println!("diff {}", (a - b)?.abs()?.max_all()?.to_scalar::<f32>()?);
        h.1 = 0.0;
        let t = Instant::now();
        for i in 0..16 {
            m.logits(&m.forward(&[ids[i]], &[Span::new(n + i as u32, 1)], &mut h)?)?;
        }
        println!("full decode {:.4} attention {:.4}", t.elapsed().as_secs_f64() / 16., h.1 / 16.);
        let t = Instant::now();
        let p = h.0.compress()?;
        println!("compress {:.3} slots {}", t.elapsed().as_secs_f64(), p[0].slots);
        h.1 = 0.0;
        let t = Instant::now();
        for i in 0..16 {
            m.logits(&m.forward(&[ids[i]], &[Span::new(n + 16 + i as u32, 1)], &mut h)?)?;
        }
        println!("20% decode {:.4} attention {:.4}", t.elapsed().as_secs_f64() / 16., h.1 / 16.);
        let t = Instant::now();
        m.logits(&m.forward(&[5], &[Span::new(0, 1)], &mut Nothing)?)?;
        println!("decode w/o attention {:.4}", t.elapsed().as_secs_f64());
    }
    Ok(())
}
