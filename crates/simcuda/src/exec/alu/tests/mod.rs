//! The table against models that read a form's name and compute what the PTX ISA says it does, with long integers or by
//! bits. A model answers for whole families, so a row that does something other than its name says is found.

mod approximate;
mod compare;
mod convert;
mod float;
mod integer;
mod table;

use super::*;
use crate::exec::registers::Row;
use crate::num::oracle::Random;

/// Lane values of one operand, as bits.
type Bits = [u64; 32];

/// Slots: two rows, or a predicate, for the destination and each of four sources.
fn slot(ty: Ty, operand: usize) -> Slot {
    if ty == Ty::Pred { operand as Slot } else { 2 * operand as Slot }
}

fn registers() -> Registers {
    Registers { rows: vec![Row([0xdead_beef; 32]); 10], predicates: vec![0x5555_aaaa; 5] }
}

fn set(r: &mut Registers, ty: Ty, slot: Slot, bits: &Bits) {
    for (lane, value) in bits.iter().enumerate() {
        match ty.bits() {
            1 => {
                let p = &mut r.predicates[slot as usize];
                *p = *p & !(1 << lane) | (*value as u32 & 1) << lane;
            }
            64 => lanes::wide_mut(r, slot)[lane] = *value,
            _ => r.rows[slot as usize].0[lane] = *value as u32,
        }
    }
}

/// Narrow values are cut to their size: what lies above them in a row does not count.
fn get(r: &Registers, ty: Ty, slot: Slot) -> Bits {
    std::array::from_fn(|lane| match ty.bits() {
        1 => u64::from(r.predicates[slot as usize] >> lane & 1),
        64 => lanes::wide(r, slot)[lane],
        bits => u64::from(r.rows[slot as usize].0[lane]) & ((1 << bits) - 1),
    })
}

/// All lanes, on the loop of a level.
fn run_on(level: usize, alu: Alu, inputs: &[Bits], env: &Env) -> Bits {
    let (mut r, signature) = (registers(), alu.signature());
    let mut src = [0; 4];
    for (i, ty) in signature.sources.iter().enumerate() {
        src[i] = slot(*ty, i + 1);
        set(&mut r, *ty, src[i], &inputs[i]);
    }
    let dst = slot(signature.destination, 0);
    alu.0.run[level](&mut r, !0, dst, src, env);
    get(&r, signature.destination, dst)
}

fn run(form: &str, inputs: &[Bits]) -> Bits {
    let alu = Alu::parse(form).unwrap_or_else(|| panic!("no form {form}"));
    run_on(level(), alu, inputs, &Env::default())
}

/// One lane.
fn one<const N: usize>(form: &str, inputs: [u64; N]) -> u64 {
    run(form, &inputs.map(|v| [v; 32]))[0]
}

/// Values of a type at which things go wrong, and random ones.
fn sample(ty: Ty, random: &mut Random) -> u64 {
    const F16: [u64; 14] = [
        0, 0x8000, 1, 0x8001, 0x3ff, 0x400, 0x3c00, 0xbc00, 0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7e00,
        0x3555,
    ];
    const BF16: [u64; 14] = [
        0, 0x8000, 1, 0x8001, 0x7f, 0x80, 0x3f80, 0xbf80, 0x7f7f, 0xff7f, 0x7f80, 0xff80, 0x7fc0,
        0x3eab,
    ];
    const F32: [u64; 16] = [
        0,
        0x8000_0000,
        1,
        0x8000_0001,
        0x007f_ffff,
        0x0080_0000,
        0x3f80_0000,
        0xbf80_0000,
        0x7f7f_ffff,
        0xff7f_ffff,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0x3f00_0000,
        0x4f00_0000,
        0x4b00_0001,
    ];
    let (edge, r) = (random.next().is_multiple_of(3), random.next());
    let pick = |from: &[u64]| from[r as usize % from.len()];
    match (ty, edge) {
        (Ty::Pred, _) => r & 1,
        (Ty::F16, true) => pick(&F16),
        (Ty::BF16, true) => pick(&BF16),
        (Ty::F16x2, true) => pick(&F16) | pick(&F16[1..]) << 16,
        (Ty::BF16x2, true) => pick(&BF16) | pick(&BF16[1..]) << 16,
        (Ty::F32, true) => pick(&F32),
        (Ty::F64, true) => f64::from(f32::from_bits(pick(&F32) as u32)).to_bits(),
        // Moderate numbers, which do not all overflow.
        (Ty::F32, _) if r & 1 == 0 => u64::from(((r >> 20) as i32 as f32 * 2e-9).to_bits()),
        (Ty::F64, _) if r & 1 == 0 => ((r as i64 >> (r % 60)) as f64 * 0.25).to_bits(),
        (_, true) => {
            let top = 1u64 << (ty.bits() - 1);
            pick(&[
                0,
                1,
                2,
                31,
                32,
                33,
                63,
                64,
                top - 1,
                top,
                top + 1,
                0u64.wrapping_sub(1),
                0u64.wrapping_sub(2),
            ])
        }
        // Small numbers often: amounts of shifts, divisors.
        (_, false) if r & 7 == 0 => r >> 8 & 63,
        _ => r,
    }
}

fn samples(ty: Ty, random: &mut Random) -> Bits {
    std::array::from_fn(|_| sample(ty, random) & (!0 >> (64 - ty.bits())))
}

/// Compares every form that `model` knows with it, over many lanes.
fn check(rounds: usize, model: impl Fn(&str, &[u64]) -> Option<u64>) {
    let mut random = Random(11);
    for form in Alu::forms() {
        let signature = Alu::parse(form).unwrap().signature();
        for _ in 0..rounds {
            let inputs: Vec<Bits> =
                signature.sources.iter().map(|ty| samples(*ty, &mut random)).collect();
            let lane_inputs = |lane: usize| inputs.iter().map(|i| i[lane]).collect::<Vec<_>>();
            if model(form, &lane_inputs(0)).is_none() {
                break;
            }
            let got = run(form, &inputs);
            for (lane, got) in got.iter().enumerate() {
                let want = model(form, &lane_inputs(lane)).unwrap()
                    & (!0 >> (64 - signature.destination.bits()));
                assert!(*got == want, "{form} {:x?}: {got:x}, want {want:x}", lane_inputs(lane));
            }
        }
    }
}
