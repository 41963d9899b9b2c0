//! The kernels' PTX, embedded, and the test that launches and kernels agree.

/// The files of `kernels/ptx/` and their texts.
macro_rules! files {
    ($($name:literal)*) => {
        &[$(($name, include_str!(concat!("../../../kernels/ptx/", $name, ".ptx")))),*]
    };
}
pub(super) const FILES: &[(&str, &str)] = files! {
    "append"
    "attend"
    "attend_mma"
    "attention_spread"
    "compact"
    "expected_attention"
    "gather"
    "key_scores"
    "lag"
    "mass_count"
    "pool"
    "projection"
    "rank"
    "residual"
    "rows"
    "saliency"
    "top_k"
    "top_k_emit"
    "value_gram"
    "value_norm"
    "window_attention"
};

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeSet;

    use super::FILES;
    use crate::backend::cuda::{launch::Arguments, launch::Kernel, signatures};

    /// A family of kernels, its types erased.
    pub struct Signature {
        file: &'static str,
        stem: &'static str,
        types: &'static [&'static str],
    }

    impl<A: Arguments> From<&Kernel<A>> for Signature {
        fn from(kernel: &Kernel<A>) -> Self {
            Self { file: kernel.file, stem: kernel.stem, types: A::PTX }
        }
    }

    /// Kernels of a PTX text, with the types of their parameters.
    fn entries(ptx: &str) -> impl Iterator<Item = (&str, Vec<&str>)> {
        ptx.split(".entry ").skip(1).map(|entry| {
            let (name, rest) = entry.split_once('(').expect("a parameter list");
            let list = rest.split(')').next().unwrap_or_default();
            let types = list.split(".param .").skip(1).map(|p| &p[..3]);
            (name.trim(), types.collect())
        })
    }

    #[test]
    fn signatures_are_those_of_the_ptx() {
        let signatures: Vec<Signature> = signatures();
        let mut used = BTreeSet::new();
        for (file, text) in FILES {
            for (name, types) in entries(text) {
                let of_name = signatures.iter().filter(|s| {
                    let rest = name.strip_prefix(s.stem);
                    s.file == *file
                        && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
                });
                let found = of_name.max_by_key(|s| s.stem.len());
                let signature =
                    found.unwrap_or_else(|| panic!("nothing launches {name} of {file}.ptx"));
                assert_eq!(signature.types, types, "{name} of {file}.ptx");
                used.insert((signature.file, signature.stem));
            }
        }
        for s in &signatures {
            assert!(used.contains(&(s.file, s.stem)), "{}.ptx has no {}", s.file, s.stem);
        }
    }
}
