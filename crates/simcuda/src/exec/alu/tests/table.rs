//! The table itself: names, signatures, masks, aliases, levels.

use super::*;

#[test]
fn forms_are_distinct_and_parse() {
    let forms = Alu::forms();
    assert!(forms.windows(2).all(|w| w[0] < w[1]), "sorted, none twice");
    for form in forms {
        let alu = Alu::parse(form).unwrap();
        assert!(alu.0.forms.contains(form));
        assert!(alu.signature().sources.len() <= 4);
    }
    assert_eq!(Alu::parse("add.s31"), None);
    assert_ne!(Alu::parse("add.s32"), Alu::parse("sub.s32"));
    assert_eq!(Alu::parse("add.s32"), Alu::parse("add.u32"));
    assert_eq!(format!("{:?}", Alu::parse("fma.rn.f32").unwrap()), "fma.rn.f32");
}

/// What compilers were seen to emit, without what touches memory or other lanes.
#[test]
fn the_measured_forms_are_there() {
    const MEASURED: &str = "add.bf16 add.f16x2 add.f32 add.rn.f32 add.s32 add.s64 add.u64 sub.f32 sub.s32 sub.s64
        mul.f16x2 mul.f32 mul.f64 mul.hi.u32 mul.lo.s32 mul.lo.s64 mul.rn.f32 mul.wide.s32 mul.wide.u32 mad.lo.s32
        mad.wide.u32 div.approx.f32 div.rn.f32 div.s32 div.u32 div.u64 rem.s32 rem.u32 min.bf16x2 min.s32 min.u32
        max.f16x2 max.f32 max.s32 abs.f32 neg.f32 neg.s32 neg.s64 sad.s32 dp4a.s32.s32 vabsdiff4.u32.u32.u32 and.b32
        and.b64 and.pred or.b32 or.b64 or.pred xor.b32 not.b32 not.pred shl.b32 shl.b64 shr.s32 shr.u32 shr.u64
        shf.l.wrap.b32 bfi.b32 bfi.b64 bfind.shiftamt.u32 brev.b32 clz.b32 clz.b64 popc.b32 popc.b64 prmt.b32 fns.b32
        mov.b16 mov.b32 mov.b64 mov.f32 mov.pred mov.u32 mov.u64 selp.b32 selp.b64 selp.f32 selp.u16 setp.eq.b32
        setp.eq.f32 setp.eq.s16 setp.eq.s32 setp.eq.s64 setp.ge.f32 setp.ge.s32 setp.ge.u32 setp.geu.f32 setp.gt.f32
        setp.gt.s32 setp.gt.u32 setp.gtu.f32 setp.le.u32 setp.leu.f32 setp.lt.f32 setp.lt.s32 setp.lt.u32 setp.ltu.f32
        setp.ne.s32 setp.ne.s64 setp.neu.f32 setp.num.f32 cvt.f32.bf16 cvt.f32.f16 cvt.f64.f32 cvt.rmi.f32.f32
        cvt.rn.bf16.f32 cvt.rn.bf16x2.f32 cvt.rn.f16.f32 cvt.rn.f16x2.f32 cvt.rn.f32.f64 cvt.rn.f32.s32 cvt.rn.f32.u32
        cvt.rn.f64.s64 cvt.rni.f32.f32 cvt.rni.s32.f32 cvt.rpi.f32.f32 cvt.rzi.f32.f32 cvt.rzi.s32.f32 cvt.s64.s32
        cvt.sat.f32.f32 cvt.u32.u64 cvt.u64.u32 fma.rm.f32 fma.rn.bf16 fma.rn.bf16x2 fma.rn.f16x2 fma.rn.f32 fma.rz.f32
        rcp.approx.ftz.f32 rcp.rn.f32 sqrt.rn.f32 rsqrt.approx.f32 ex2.approx.f32 ex2.approx.ftz.f32 lg2.approx.f32
        copysign.f32 div.full.f32 sin.approx.f32 cos.approx.f32";
    for form in MEASURED.split_whitespace() {
        assert!(Alu::parse(form).is_some(), "{form}");
    }
}

/// So that no row goes unchecked.
#[test]
fn every_form_has_one_model() {
    let models = [integer::model, float::model, convert::model, compare::model];
    for form in Alu::forms() {
        let known = models.iter().filter(|model| model(form, &[1; 4]).is_some()).count();
        let elsewhere = form.contains("approx") || form.contains("full") || form.contains("tf32");
        assert_eq!(known, usize::from(!elsewhere), "{form}");
    }
}

/// The last modifier is the type of the sources, or of the first.
#[test]
fn signatures_have_the_size_of_the_name() {
    for form in Alu::forms() {
        let signature = Alu::parse(form).unwrap().signature();
        let types = form.split('.').rev();
        let Some(size) = types.clone().find_map(|t| match t {
            "pred" => Some(1),
            "f16x2" | "bf16x2" | "tf32" => Some(32),
            _ if t.starts_with(['b', 'u', 's', 'f']) => {
                t.trim_start_matches(|c: char| c.is_alphabetic()).parse().ok()
            }
            _ => None,
        }) else {
            panic!("{form} names no type");
        };
        let first = signature.sources[0];
        let expected = if form.starts_with("slct") { signature.sources[2] } else { first };
        assert_eq!(expected.bits(), size, "{form}");
    }
}

/// On random input: every level gives the same, in the lanes of the mask and nowhere else, also where the destination
/// is a source; perturbed or not.
#[test]
fn levels_masks_and_aliases() {
    let mut random = Random(1);
    for form in Alu::forms() {
        let alu = Alu::parse(form).unwrap();
        let signature = alu.signature();
        for round in 0..6 {
            let env = Env { perturb: (round % 2 == 1).then_some(99) };
            let inputs: Vec<Bits> =
                signature.sources.iter().map(|ty| samples(*ty, &mut random)).collect();
            let all = run_on(0, alu, &inputs, &env);
            if level() > 0 {
                assert_eq!(all, run_on(level(), alu, &inputs, &env), "{form} {inputs:x?}");
            }
            let mask = match round {
                0 => 0,
                1 => !0,
                _ => random.next() as u32,
            };
            for level in 0..=level() {
                for alias in 0..=signature.sources.len() {
                    let ty = signature.destination;
                    let mut r = registers();
                    let mut src = [0; 4];
                    for (i, ty) in signature.sources.iter().enumerate() {
                        src[i] = slot(*ty, i + 1);
                        set(&mut r, *ty, src[i], &inputs[i]);
                    }
                    let aliased = alias.checked_sub(1).filter(|i| {
                        let source = signature.sources[*i];
                        (source == Ty::Pred) == (ty == Ty::Pred)
                            && source.bits().max(32) == ty.bits().max(32)
                    });
                    let dst = aliased.map_or(slot(ty, 0), |i| src[i]);
                    let before = r.clone();
                    alu.0.run[level](&mut r, mask, dst, src, &env);
                    let (got, kept) = (get(&r, ty, dst), get(&before, ty, dst));
                    for lane in 0..32 {
                        let want = if mask >> lane & 1 != 0 { all[lane] } else { kept[lane] };
                        assert_eq!(
                            got[lane], want,
                            "{form} lane {lane} of {mask:x}, alias {aliased:?}"
                        );
                    }
                    // Nothing else changed.
                    set(&mut r, ty, dst, &kept);
                    let low = |rows: &[Row], n: usize| {
                        rows[n].0.map(|w| u64::from(w) & (!0 >> (64 - ty.bits().clamp(1, 32))))
                    };
                    for n in 0..r.rows.len() {
                        assert!(
                            r.rows[n].0 == before.rows[n].0
                                || low(&r.rows, n) == low(&before.rows, n),
                            "{form}"
                        );
                    }
                    assert_eq!(r.predicates, before.predicates, "{form}");
                }
            }
        }
    }
}
