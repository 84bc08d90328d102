//! Settings as TOML: the configuration file read, and the effective configuration written.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::Context;

use super::settings::SETTINGS;
use super::{AGENT, Given, Origin, Setting, SettingKind, Values, Verbs};
use crate::error::CommandError;

/// Largest configuration file that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Reads the settings in a file. Whether a value is within its bounds is checked with all others.
pub(super) fn read(path: &Path) -> anyhow::Result<Values> {
    let failed = || format!("failed to read the configuration file {}", path.display());
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_string(&mut text));
    let wrong = |what: String| CommandError::Usage(format!("{}: {what}", path.display()));
    if read.with_context(failed)? as u64 > MAX_BYTES {
        return Err(wrong(format!("larger than {} KiB, so it is no configuration file", MAX_BYTES >> 10)).into());
    }
    let table: toml::Table =
        text.parse().map_err(|error: toml::de::Error| wrong(format!("not TOML: {}", error.to_string().trim())))?;
    let mut values = Values::new();
    for (key, value) in &table {
        let setting = named(key).map_err(wrong)?;
        let text = text_of(&setting.kind, value).map_err(|what| wrong(format!("{key}: {what}")))?;
        values.insert(setting.key, Given { text, origin: Origin::File(path.to_owned()) });
    }
    Ok(values)
}

/// The setting with this key.
fn named(key: &str) -> Result<&'static Setting, String> {
    let of_agent = || SETTINGS.iter().filter(|setting| setting.verbs & AGENT != 0);
    if let Some(setting) = of_agent().find(|setting| setting.key == key) {
        return Ok(setting);
    }
    Err(match of_agent().find(|setting| setting.flag == key) {
        Some(setting) => format!("unknown key `{key}`: write `{}`", setting.key),
        None => format!("unknown key `{key}`: `memtrace agent --print-config` lists the keys"),
    })
}

/// A value of the file as the command line takes it.
fn text_of(kind: &SettingKind, value: &toml::Value) -> Result<OsString, String> {
    use toml::Value::{Array, Boolean, Float, Integer, String};
    match (kind, value) {
        (SettingKind::Switch { .. }, Boolean(on)) => Ok(on.to_string().into()),
        (SettingKind::Switch { .. }, _) => Err("must be true or false".to_owned()),
        (SettingKind::Count { .. }, Integer(count)) => Ok(count.to_string().into()),
        (SettingKind::Count { .. }, _) => Err("must be a number".to_owned()),
        (SettingKind::Hooks { .. } | SettingKind::Names { .. }, Array(items)) => {
            let names: Option<Vec<&str>> = items.iter().map(toml::Value::as_str).collect();
            names.map(|names| names.join(",").into()).ok_or_else(|| "must be a list of names".to_owned())
        }
        (SettingKind::Hooks { .. }, _) => Err("must be a list, such as [\"map\"]".to_owned()),
        (SettingKind::Names { .. }, _) => Err("must be a list, such as [\"node1.example\"]".to_owned()),
        (_, String(text)) => Ok(text.into()),
        (SettingKind::Size { .. } | SettingKind::Share { .. }, Integer(number)) => Ok(number.to_string().into()),
        (SettingKind::Share { .. }, Float(number)) => Ok(number.to_string().into()),
        (kind, _) => Err(format!("must be a string{}", example(kind))),
    }
}

const fn example(kind: &SettingKind) -> &'static str {
    match kind {
        SettingKind::Size { .. } => ", such as \"16M\"",
        SettingKind::Span { .. } => ", such as \"30s\"",
        SettingKind::Share { .. } => ", such as \"1%\"",
        _ => "",
    }
}

/// The settings of `verb` with their descriptions as comments; one that is unset is a comment itself.
pub(super) fn render(verb: Verbs, values: &Values) -> anyhow::Result<String> {
    let mut out = format!(
        "# Effective configuration of the agent of memtrace {}: defaults, file and flags.\n\
         # `memtrace agent --config FILE` takes this file.\n",
        env!("CARGO_PKG_VERSION")
    );
    for setting in SETTINGS.iter().filter(|setting| setting.verbs & verb != 0) {
        let _ = writeln!(out, "\n# {}.", setting.help);
        if !setting.note.is_empty() {
            let _ = writeln!(out, "# {}", setting.note);
        }
        let range = setting.range().map(|range| format!("Values: {range}."));
        let default = setting.default_for(verb).map(|default| format!("Default: {default}."));
        let facts: Vec<String> = range.into_iter().chain(default).collect();
        if !facts.is_empty() {
            let _ = writeln!(out, "# {}", facts.join(" "));
        }
        let _ = match values.get(setting.key) {
            Some(given) => writeln!(out, "{} = {}", setting.key, literal(setting, given)?),
            None => writeln!(out, "# {} = {}", setting.key, unset(&setting.kind)),
        };
    }
    Ok(out)
}

/// A value as TOML.
fn literal(setting: &Setting, given: &Given) -> anyhow::Result<String> {
    let text = given.text.to_str().with_context(|| {
        format!("failed to write --{} {:?} as TOML: it is not valid UTF-8", setting.flag, given.text)
    })?;
    let quoted = |text: &str| toml::Value::from(text).to_string();
    Ok(match setting.kind {
        SettingKind::Switch { .. } | SettingKind::Count { .. } => text.trim().to_owned(),
        SettingKind::Hooks { .. } | SettingKind::Names { .. } => {
            let names = text.split(',').filter(|name| !name.is_empty()).map(quoted);
            format!("[{}]", names.collect::<Vec<_>>().join(", "))
        }
        _ => quoted(text),
    })
}

/// What stands for a value that is unset.
const fn unset(kind: &SettingKind) -> &'static str {
    match kind {
        SettingKind::Switch { .. } => "false",
        SettingKind::Hooks { .. } | SettingKind::Names { .. } => "[]",
        _ => "\"\"",
    }
}
