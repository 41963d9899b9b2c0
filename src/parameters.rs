//! Parameters by name: what `--set key=value` reaches, listed so that an unknown key can be answered with the
//! known ones.

use crate::error::{Error, Result};

/// Named parameters of a part of a policy.
pub(crate) trait Parameters {
    /// Names and current values.
    fn list(&self) -> Vec<(&'static str, String)>;
    /// Sets one; `false` if there is none of that name.
    fn set(&mut self, key: &str, value: &str) -> Result<bool>;
}

/// Numbers as text; none as an empty one.
pub(crate) fn join(numbers: &[f64]) -> String {
    numbers.iter().map(f64::to_string).collect::<Vec<_>>().join(",")
}

/// The inverse of [`join`].
pub(crate) fn numbers(name: &'static str, text: &str) -> Result<Vec<f64>> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let number = |s: &str| s.trim().parse::<f64>().ok();
    text.split(',').map(number).collect::<Option<_>>().ok_or_else(|| Error::Parameter {
        name,
        expected: "numbers separated by commas (layers of heads by semicolons)",
        got: text.to_owned(),
    })
}

/// Implements [`Parameters`] for fields that print and parse: `field: "what is expected"`.
macro_rules! parameters {
    ($type:ty { $($field:ident : $expected:literal),* $(,)? }) => {
        impl $crate::parameters::Parameters for $type {
            fn list(&self) -> Vec<(&'static str, String)> {
                vec![$((stringify!($field), self.$field.to_string())),*]
            }
            #[allow(unused_variables, reason = "a part may have no parameters")]
            fn set(&mut self, key: &str, value: &str) -> $crate::error::Result<bool> {
                match key {
                    $(stringify!($field) => {
                        self.$field = value.parse().map_err(|_| $crate::error::Error::Parameter {
                            name: stringify!($field),
                            expected: $expected,
                            got: value.to_owned(),
                        })?;
                        Ok(true)
                    })*
                    _ => Ok(false),
                }
            }
        }
    };
}
pub(crate) use parameters;

/// Lower-case names for small enums: `Display` and `FromStr`.
macro_rules! named {
    ($type:ty { $($variant:ident => $name:literal),* $(,)? }) => {
        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self { $(Self::$variant => $name),* })
            }
        }
        impl std::str::FromStr for $type {
            type Err = $crate::error::Error;
            fn from_str(text: &str) -> $crate::error::Result<Self> {
                match text {
                    $($name => Ok(Self::$variant),)*
                    _ => Err($crate::error::Error::Parameter {
                        name: stringify!($type),
                        expected: concat!($($name, " ",)* "(one of these)"),
                        got: text.to_owned(),
                    }),
                }
            }
        }
    };
}
pub(crate) use named;
