//! Policies as the command line names them: `snapkv`, `kvpress:snapkv`, and `--set` on top.

use std::path::Path;

use anyhow::{Context, Result, bail};
use kvbudget::{Error, PolicyConfig, Reference};

use crate::stored;

/// A preset (`snapkv`), or a published code's version of it (`kvpress:snapkv`).
pub fn config(name: &str, reference: Option<Reference>) -> Result<PolicyConfig> {
    let (reference, name) = match name.split_once(':') {
        Some((code, name)) => (Some(code.parse()?), name),
        None => (reference, name),
    };
    let mut config = match reference {
        Some(code) => kvbudget::reference(code, name)?,
        None => kvbudget::preset(name)?,
    };
    if let Some(code) = reference {
        config.name = format!("{code}:{name}");
    }
    Ok(config)
}

/// Gives every policy whose budgets over layers ask for measurements those of the file.
pub fn measure_layers(configs: &mut [PolicyConfig], file: Option<&Path>) -> Result<()> {
    let Some(file) = file else { return Ok(()) };
    let profile = stored::read_layer_profile(file)?;
    let named = || format!("{}", file.display());
    let mut refused = None;
    let mut reached = false;
    for config in configs {
        match profile.apply(config) {
            Ok(()) => reached = true,
            Err(e @ Error::Unsupported { .. }) => refused = Some(e),
            Err(e) => return Err(e).with_context(named),
        }
    }
    match refused {
        Some(e) if !reached => Err(e).with_context(named),
        _ => Ok(()),
    }
}

/// Applies `key=value` to every policy that has the parameter, `policy.key=value` to that policy alone.
/// A setting that reaches nothing is an error that lists what there is.
pub fn set(configs: &mut [PolicyConfig], settings: &[String]) -> Result<()> {
    for setting in settings {
        apply(configs, setting).with_context(|| format!("--set {setting}"))?;
    }
    Ok(())
}

fn apply(configs: &mut [PolicyConfig], setting: &str) -> Result<()> {
    let Some((target, value)) = setting.split_once('=') else {
        bail!("expected key=value or policy.key=value");
    };
    let (scope, key) = match target.rsplit_once('.') {
        Some((policy, key)) => (Some(policy.trim()), key.trim()),
        None => (None, target.trim()),
    };
    let mut reached = false;
    let mut unknown = None;
    for config in configs.iter_mut().filter(|c| scope.is_none_or(|name| c.name == name)) {
        match config.set(key, value.trim()) {
            Ok(()) => reached = true,
            Err(e @ Error::UnknownName { .. }) => {
                let known = format!("policy {}", config.name);
                unknown = Some(anyhow::Error::new(e).context(known));
            }
            Err(e) => return Err(e.into()),
        }
    }
    match unknown {
        _ if reached => Ok(()),
        Some(e) => Err(e),
        None => {
            let names: Vec<&str> = configs.iter().map(|c| c.name.as_str()).collect();
            bail!("no policy {:?} here; there are: {}", scope.unwrap_or(""), names.join(", "))
        }
    }
}
