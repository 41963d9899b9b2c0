//! Approximate functions: right by default, within the documented error when perturbed.

use super::*;
use crate::num::half::{bf16_to_f32, f16_to_f32};

const SEED: Env = Env { perturb: Some(17) };

/// What the PTX ISA (9.1) says of a function at `a`: the exact value and the largest error. None where it says nothing.
fn documented(form: &str, a: f64, b: f64) -> Option<(f64, f64)> {
    let ulp = |x: f64| 2f64.powi((x.abs().log2().floor() as i32).max(-126) - 23);
    let half = form.ends_with("f16") || form.ends_with("f16x2") || form.ends_with("bf16x2");
    let brain = form.contains("bf16");
    Some(match form.split('.').next().unwrap() {
        "rcp" => (1.0 / a, ulp(1.0 / a)),
        "sqrt" => (a.sqrt(), a.sqrt() * 2f64.powi(-23)),
        "rsqrt" => (1.0 / a.sqrt(), 2f64.powf(-22.9) / a.sqrt()),
        "ex2" if half => (a.exp2(), a.exp2() * if brain { 2f64.powi(-7) } else { 2f64.powf(-9.9) }),
        "ex2" => (a.exp2(), 2.0 * ulp(a.exp2())),
        "lg2" if a > 0.5 && a < 2.0 => (a.log2(), 2f64.powi(-22)),
        "lg2" => (a.log2(), a.log2().abs() * 2f64.powi(-22)),
        "sin" | "cos" if a.abs() > 314.0 => return None,
        name @ ("sin" | "cos") => (
            if name == "sin" { a.sin() } else { a.cos() },
            2f64.powf(if a.abs() <= std::f64::consts::TAU { -20.5 } else { -14.7 }),
        ),
        "tanh" if brain => (a.tanh(), 2f64.powi(-8)),
        "tanh" if half => (a.tanh(), 2f64.powf(-10.987)),
        "tanh" => (a.tanh(), a.tanh().abs() * 2f64.powi(-11)),
        "div"
            if form.contains("approx")
                && !(2f64.powi(-126)..=2f64.powi(126)).contains(&b.abs()) =>
        {
            return None;
        }
        "div" => (a / b, 2.0 * ulp(a / b)),
        _ => return None,
    })
}

fn approximate() -> impl Iterator<Item = &'static str> {
    Alu::forms().iter().copied().filter(|f| f.contains(".approx") || f.contains(".full"))
}

#[test]
fn results_are_near_and_stay_near_when_perturbed() {
    let mut random = Random(8);
    assert_eq!(approximate().count(), 27);
    for form in approximate() {
        let (alu, ftz) = (Alu::parse(form).unwrap(), form.contains("ftz"));
        let ty = alu.signature().destination;
        let parts: u32 = if matches!(ty, Ty::F16x2 | Ty::BF16x2) { 2 } else { 1 };
        let value = |bits: u64, part: u32| -> f64 {
            match ty {
                Ty::F32 => f32::from_bits(bits as u32).into(),
                Ty::F16 | Ty::F16x2 => f16_to_f32((bits >> (16 * part)) as u16).into(),
                _ => bf16_to_f32((bits >> (16 * part)) as u16).into(),
            }
        };
        let (mut moved, mut total) = (0, 0);
        for _ in 0..100 {
            let inputs: Vec<Bits> =
                alu.signature().sources.iter().map(|ty| samples(*ty, &mut random)).collect();
            let plain = run_on(level(), alu, &inputs, &Env::default());
            let perturbed = run_on(level(), alu, &inputs, &SEED);
            assert_eq!(perturbed, run_on(level(), alu, &inputs, &SEED), "{form}");
            for (lane, part) in (0..32).flat_map(|lane| (0..parts).map(move |part| (lane, part))) {
                let input = |i: usize| inputs.get(i).map_or(1.0, |v| value(v[lane], part));
                let (a, b) = (input(0), input(1));
                let smallest = f64::from(f32::MIN_POSITIVE);
                let small = |x: f64| ftz && x.abs() < smallest;
                let Some((exact, error)) =
                    documented(form, a, b).filter(|_| !small(a) && !small(b))
                else {
                    continue;
                };
                let (got, near) = (value(perturbed[lane], part), value(plain[lane], part));
                if !exact.is_finite() || exact.abs() > f64::from(f32::MAX) || exact == 0.0 {
                    assert_eq!(got.to_bits(), near.to_bits(), "{form} {a:e}");
                    let want = if ty == Ty::F32 { f64::from(exact as f32) } else { exact };
                    assert!(
                        got == want
                            || got.is_nan() && want.is_nan()
                            || exact.is_finite() && ty != Ty::F32,
                        "{form} {a:e}: {got:e}"
                    );
                    continue;
                }
                // Half a unit of the format, as what is nearest may be that far.
                let unit = match ty {
                    Ty::F32 => 2f64.powi((exact.abs().log2().floor() as i32).max(-126) - 24),
                    Ty::F16 | Ty::F16x2 => {
                        2f64.powi((exact.abs().log2().floor() as i32).max(-14) - 11)
                    }
                    _ => 2f64.powi((exact.abs().log2().floor() as i32).max(-126) - 8),
                } * 1.000_000_1;
                let top =
                    if ty == Ty::F16 || ty == Ty::F16x2 { 65504.0 } else { f64::from(f32::MAX) };
                if exact.abs() > top || (ftz && exact.abs() < 2.0 * smallest) {
                    continue;
                }
                assert!(
                    (near - exact).abs() <= unit,
                    "{form} {a:e} {b:e}: {near:e}, exactly {exact:e}"
                );
                assert!(
                    (got - exact).abs() <= error.max(unit),
                    "{form} {a:e} {b:e}: {got:e}, exactly {exact:e}, error {error:e}"
                );
                total += 1;
                moved += i32::from(got != near);
            }
        }
        assert!(moved * 10 > total, "{form}: {moved} of {total} moved");
    }
}

#[test]
fn seeds_differ() {
    let inputs: Bits = std::array::from_fn(|lane| (1.1f32 + lane as f32).to_bits().into());
    let alu = Alu::parse("rsqrt.approx.f32").unwrap();
    let by_seed = |seed| run_on(level(), alu, &[inputs], &Env { perturb: Some(seed) });
    assert_ne!(by_seed(1), by_seed(2));
}

/// The tables of corner cases, perturbed or not.
#[test]
fn corners() {
    let f = |x: f32| u64::from(x.to_bits());
    let (inf, nan) = (f32::INFINITY, 0x7fff_ffff);
    for (form, a, want) in [
        ("ex2.approx.f32", -inf, 0),
        ("ex2.approx.f32", -0.0, f(1.0)),
        ("ex2.approx.f32", inf, f(inf)),
        ("ex2.approx.ftz.f32", 1e-40, f(1.0)),
        ("ex2.approx.ftz.f32", -127.0, 0),
        ("ex2.approx.f32", f32::NAN, nan),
        ("lg2.approx.f32", -inf, nan),
        ("lg2.approx.f32", -1.0, nan),
        ("lg2.approx.f32", -0.0, f(-inf)),
        ("lg2.approx.f32", inf, f(inf)),
        ("lg2.approx.ftz.f32", 1e-40, f(-inf)),
        ("rcp.approx.f32", -inf, f(-0.0)),
        ("rcp.approx.f32", -0.0, f(-inf)),
        ("rcp.approx.ftz.f32", -1e-40, f(-inf)),
        ("rsqrt.approx.f32", -0.0, f(-inf)),
        ("rsqrt.approx.f32", inf, 0),
        ("rsqrt.approx.f32", -2.0, nan),
        ("sqrt.approx.f32", -0.0, f(-0.0)),
        ("sqrt.approx.f32", -2.0, nan),
        ("sqrt.approx.f32", inf, f(inf)),
        ("sin.approx.f32", inf, nan),
        ("sin.approx.f32", -0.0, f(-0.0)),
        ("cos.approx.f32", 0.0, f(1.0)),
        ("tanh.approx.f32", -inf, f(-1.0)),
        ("tanh.approx.f32", -0.0, f(-0.0)),
        ("tanh.approx.f32", 1e-40, f(1e-40)),
    ] {
        for env in [Env::default(), SEED] {
            let got = run_on(level(), Alu::parse(form).unwrap(), &[[f(a); 32]], &env)[0];
            assert_eq!(got, want, "{form} {a:e}");
        }
    }
    let large = 1.5 * 2f32.powi(126);
    assert_eq!(one("div.approx.f32", [f(-large), f(large)]), f(-0.0), "the largest divisors");
    assert_eq!(one("div.approx.f32", [f(inf), f(large)]), nan);
    assert_eq!(one("div.full.f32", [f(-large), f(large)]), f(-1.0));
}
