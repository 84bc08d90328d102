//! The configuration: what a user can set, from the defaults, a file and the command line.
//!
//! A setting is one entry of the table in [`settings`]: its key, flag, type, bounds, default and one sentence. The flags
//! of every verb, the keys of the TOML file, `--help`, the man pages, `--print-config` and `docs/flags.md` are made from
//! that table, so to add a setting is to add an entry and the field it is for.
//!
//! A value stays text until every source is known: defaults, then the file, then the command line are laid over one
//! another ([`Config::load`]), and only the result is parsed into an [`AgentConfig`]. Each value remembers where it comes from,
//! so that an error can name the flag, or the file and the key.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::values::{Share, Size, Span};
use crate::agent::AgentConfig;
use crate::error::CommandError;
use crate::kernel::hooks::{Hook, HookNeed};
use crate::session::SessionConfig;

mod file;
mod flags;
pub(super) mod settings;

pub(super) use flags::Flags;
use settings::SETTINGS;

/// A verb that takes settings, one bit each, so that a setting can name several.
pub(super) type Verbs = u8;
/// `memtrace agent`.
pub(super) const AGENT: Verbs = 1;
/// `memtrace record`.
pub(super) const RECORD: Verbs = 2;
/// `memtrace doctor`.
pub(super) const DOCTOR: Verbs = 4;
/// `memtrace incidents` and `memtrace report`.
pub(super) const READ: Verbs = 8;

/// One thing a user can set.
#[derive(Debug)]
pub(super) struct Setting {
    /// Key in the configuration file: words joined by `_`.
    pub(super) key: &'static str,
    /// Flag without its dashes: the same words joined by `-`.
    pub(super) flag: &'static str,
    /// One sentence without a full stop, for every place that describes the setting.
    pub(super) help: &'static str,
    /// More that is worth knowing, as whole sentences, for the places that have room; may be empty.
    pub(super) note: &'static str,
    /// Default as a user would type it; `None` when the setting is unset by default.
    pub(super) default: Option<&'static str>,
    /// Default of `memtrace record`, where it is another.
    pub(super) record_default: Option<&'static str>,
    /// The verbs that take it.
    pub(super) verbs: Verbs,
    /// Type, bounds, and the field it sets.
    pub(super) kind: SettingKind,
}

/// The type of a setting, its bounds, and where the value goes.
#[derive(Debug)]
pub(super) enum SettingKind {
    /// A size in bytes.
    Size { min: Least, max: Option<u64>, power_of_two: bool, set: fn(&mut AgentConfig, u64) },
    /// A time span.
    Span { max: Option<Duration>, set: fn(&mut AgentConfig, Duration) },
    /// A share of one CPU, 0 to 100 %, in parts per million.
    Share { set: fn(&mut AgentConfig, u64) },
    /// A whole number.
    Count { min: u32, max: u32, set: fn(&mut AgentConfig, u32) },
    /// A directory.
    Dir { set: fn(&mut AgentConfig, PathBuf) },
    /// A file.
    File { set: fn(&mut AgentConfig, PathBuf) },
    /// A socket address; `off` is none.
    Address { set: fn(&mut AgentConfig, Option<SocketAddr>) },
    /// A path of a socket; `off` is none.
    Socket { set: fn(&mut AgentConfig, Option<PathBuf>) },
    /// A group of users, by name or number.
    Group { set: fn(&mut AgentConfig, String) },
    /// A list of hooks.
    Hooks { set: fn(&mut AgentConfig, Vec<Hook>) },
    /// A list of host names.
    Names { set: fn(&mut AgentConfig, Vec<String>) },
    /// On when it is given, off by default.
    Switch { set: fn(&mut AgentConfig, bool) },
}

/// A lower bound of a size.
#[derive(Clone, Copy, Debug)]
pub(super) enum Least {
    /// Bytes.
    Bytes(u64),
    /// Pages of the running kernel.
    Pages(u64),
}

impl Setting {
    /// The default of `verb` as text.
    fn default_for(&self, verb: Verbs) -> Option<&'static str> {
        self.record_default.filter(|_| verb == RECORD).or(self.default)
    }

    /// Parses a value, checks its bounds and sets the field it is for. The error says what would be valid.
    fn apply(&self, text: &OsStr, config: &mut AgentConfig) -> Result<(), String> {
        let as_text = || text.to_str().ok_or_else(|| format!("{text:?} is not valid UTF-8"));
        match &self.kind {
            SettingKind::Dir { .. } | SettingKind::File { .. } if text.is_empty() => {
                return Err("a path must not be empty".to_owned());
            }
            SettingKind::Dir { set } | SettingKind::File { set } => set(config, PathBuf::from(text)),
            SettingKind::Size { min, max, power_of_two, set } => {
                let Size(bytes) = as_text()?.parse()?;
                let within = bytes >= min.bytes() && max.is_none_or(|max| bytes <= max);
                if !within || (*power_of_two && !bytes.is_power_of_two()) {
                    return Err(self.out_of_range(text));
                }
                set(config, bytes);
            }
            SettingKind::Span { max, set } => {
                let Span(span) = as_text()?.parse()?;
                if max.is_some_and(|max| span > max) {
                    return Err(self.out_of_range(text));
                }
                set(config, span);
            }
            SettingKind::Share { set } => {
                let Share(ppm) = as_text()?.parse()?;
                set(config, ppm);
            }
            SettingKind::Count { min, max, set } => {
                let count: u32 = as_text()?.trim().parse().map_err(|_| self.out_of_range(text))?;
                if !(*min..=*max).contains(&count) {
                    return Err(self.out_of_range(text));
                }
                set(config, count);
            }
            SettingKind::Address { set } => set(config, address(as_text()?)?),
            SettingKind::Socket { set } => set(config, socket(text)?),
            SettingKind::Group { set } => set(config, group(as_text()?)?),
            SettingKind::Hooks { set } => set(config, hooks(as_text()?)?),
            SettingKind::Names { set } => set(config, names(as_text()?)?),
            SettingKind::Switch { set } => {
                set(config, as_text()?.parse().map_err(|_| format!("`{}` is not true or false", text.display()))?);
            }
        }
        Ok(())
    }

    /// Whether `text` is a valid value.
    fn check(&self, text: &OsStr) -> Result<(), String> {
        self.apply(text, &mut empty())
    }

    fn out_of_range(&self, text: &OsStr) -> String {
        let range = self.range_with(|least| Size(least.bytes()).to_string());
        format!("`{}` is out of range ({})", text.display(), range.unwrap_or_default())
    }

    /// The valid values in words that are the same on every machine, such as `4 pages to 1G`; `None` when the type says
    /// it all.
    pub(super) fn range(&self) -> Option<String> {
        self.range_with(|least| match least {
            Least::Bytes(bytes) => Size(bytes).to_string(),
            Least::Pages(1) => "1 page".to_owned(),
            Least::Pages(pages) => format!("{pages} pages"),
        })
    }

    fn range_with(&self, shown: impl Fn(Least) -> String) -> Option<String> {
        match &self.kind {
            SettingKind::Size { min: Least::Bytes(0), max: None, .. } => None,
            SettingKind::Size { min, max, power_of_two, .. } => {
                let min = shown(*min);
                Some(match max {
                    Some(max) if *power_of_two => format!("a power of two from {min} to {}", Size(*max)),
                    Some(max) => format!("{min} to {}", Size(*max)),
                    None => format!("at least {min}"),
                })
            }
            SettingKind::Span { max, .. } => max.map(|max| format!("at most {}", Span(max))),
            SettingKind::Share { .. } => Some("0% to 100%".to_owned()),
            SettingKind::Count { min, max, .. } => Some(format!("{min} to {max}")),
            _ => None,
        }
    }

    /// Placeholder of the value in `--help`; `None` for a switch.
    pub(super) const fn value_name(&self) -> Option<&'static str> {
        Some(match self.kind {
            SettingKind::Size { .. } => "SIZE",
            SettingKind::Span { .. } => "SPAN",
            SettingKind::Share { .. } => "PERCENT",
            SettingKind::Count { .. } => "N",
            SettingKind::Dir { .. } => "DIR",
            SettingKind::File { .. } => "FILE",
            SettingKind::Address { .. } => "ADDR",
            SettingKind::Socket { .. } => "PATH",
            SettingKind::Group { .. } => "GROUP",
            SettingKind::Hooks { .. } => "HOOK",
            SettingKind::Names { .. } => "NAME",
            SettingKind::Switch { .. } => return None,
        })
    }
}

impl Least {
    fn bytes(self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Pages(pages) => pages.saturating_mul(rustix::param::page_size() as u64),
        }
    }
}

fn address(text: &str) -> Result<Option<SocketAddr>, String> {
    if text == "off" {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| format!("`{text}` is not an address: give one such as 127.0.0.1:9469, or `off`"))
}

/// `none` and nothing at all are taken for `off`, so that no such file is made.
fn socket(text: &OsStr) -> Result<Option<PathBuf>, String> {
    let path = Path::new(text);
    match text.to_str() {
        Some("off" | "none" | "") => Ok(None),
        _ if path.is_absolute() && path.file_name().is_some() => Ok(Some(path.to_owned())),
        _ => Err(format!("`{}` is not the path of a socket: give one that begins with `/`, or `off`", path.display())),
    }
}

fn group(text: &str) -> Result<String, String> {
    match text.is_empty() || text.contains([':', '\n']) {
        true => Err(format!("`{}` is not a group: give its name or its number", text.escape_debug())),
        false => Ok(text.to_owned()),
    }
}

fn hooks(text: &str) -> Result<Vec<Hook>, String> {
    let named = |name: &str| {
        let known = || Hook::ALL.map(Hook::name).join(", ");
        Hook::named(name).ok_or_else(|| format!("`{name}` is not a hook: there are {}", known()))
    };
    text.split(',').filter(|name| !name.is_empty()).map(named).collect()
}

fn names(text: &str) -> Result<Vec<String>, String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let name = |name: &str| match name.chars().all(is_part) {
        true => Ok(name.to_owned()),
        false => Err(format!("`{name}` is not a host name: give one such as node1.example, without a port")),
    };
    text.split(',').filter(|name| !name.is_empty()).map(name).collect()
}

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    Default,
    File(PathBuf),
    Flag,
}

/// A value as it was given. It is text until all sources are known, in the form that the command line takes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Given {
    text: OsString,
    origin: Origin,
}

/// Values by the key of their setting. Cap: one for each of [`SETTINGS`].
type Values = BTreeMap<&'static str, Given>;

/// The effective value of every setting of a verb.
#[derive(Clone, Debug)]
pub(super) struct Config {
    verb: Verbs,
    values: Values,
}

impl Config {
    /// Lays the file over the defaults and the flags over the file.
    ///
    /// Fails when the file cannot be read, or with [`CommandError::Usage`] when it is not TOML or has an unknown key or a
    /// value of the wrong type.
    pub(super) fn load<const VERB: Verbs>(file: Option<&Path>, flags: &Flags<VERB>) -> anyhow::Result<Self> {
        let defaults = SETTINGS.iter().filter_map(|setting| {
            let text = setting.default_for(VERB)?.into();
            Some((setting.key, Given { text, origin: Origin::Default }))
        });
        let mut values: Values = defaults.collect();
        if let Some(path) = file {
            values.extend(file::read(path)?);
        }
        values.extend(flags.values());
        Ok(Self { verb: VERB, values })
    }

    /// The values parsed and checked. What is not a setting is off or zero: the verb sets it.
    ///
    /// Fails with [`CommandError::Usage`] that names the flag, or the file and the key.
    pub(super) fn parse(&self) -> Result<AgentConfig, CommandError> {
        let mut config = empty();
        for setting in SETTINGS {
            if let Some(given) = self.values.get(setting.key) {
                setting
                    .apply(&given.text, &mut config)
                    .map_err(|what| CommandError::Usage(format!("{}: {what}", place(setting, &given.origin))))?;
            }
        }
        // `doctor` reports this in full, as one of the reasons why memtrace cannot run.
        if self.verb != DOCTOR {
            self.check_hooks(&config.session.without)?;
        }
        Ok(config)
    }

    /// Whether a setting was given, by its key, and not left at its default.
    pub(super) fn is_given(&self, key: &str) -> bool {
        self.values.get(key).is_some_and(|given| given.origin != Origin::Default)
    }

    /// The effective configuration as TOML with comments; `memtrace agent --config` accepts it.
    ///
    /// Fails when a path is not UTF-8, which TOML cannot express.
    pub(super) fn to_toml(&self) -> anyhow::Result<String> {
        file::render(self.verb, &self.values)
    }

    fn check_hooks(&self, without: &[Hook]) -> Result<(), CommandError> {
        // Charges replace the rss hook where they can be hooked.
        let replaced = |hook: Hook| hook == Hook::Rss && !without.contains(&Hook::Charge);
        let needed = without.iter().find(|hook| matches!(hook.need(), HookNeed::Required) && !replaced(**hook));
        let Some(hook) = needed else { return Ok(()) };
        let setting = SETTINGS.iter().find(|setting| matches!(setting.kind, SettingKind::Hooks { .. }));
        let given = setting.and_then(|setting| Some((setting, self.values.get(setting.key)?)));
        let place = given.map_or_else(String::new, |(setting, given)| place(setting, &given.origin));
        Err(CommandError::Usage(format!("{place}: memtrace cannot run without the hook {hook}")))
    }
}

/// The flag, or the file and the key, that a value was given by.
fn place(setting: &Setting, origin: &Origin) -> String {
    match origin {
        Origin::File(path) => format!("{}: {}", path.display(), setting.key),
        Origin::Flag | Origin::Default => format!("--{}", setting.flag),
    }
}

/// What the settings are applied to: everything is zero, empty or off.
fn empty() -> AgentConfig {
    AgentConfig {
        session: SessionConfig {
            btf: None,
            without: Vec::new(),
            rss_threshold_bytes: 0,
            before_ns: 0,
            after_ns: 0,
            max_processes: 0,
            samples_ring_bytes: 0,
            // Not a setting: `record` takes more.
            stacks_ring_bytes: 4 << 20,
            sample_interval_bytes: 0,
            // Not a setting: `record` takes stacks of what it records only.
            sample_all: true,
            stack_budget_ppm: 0,
            spikes: true,
            near_misses: true,
            kernel_log: true,
            journal: None,
        },
        state_dir: PathBuf::new(),
        listen: None,
        socket: None,
        socket_group: None,
        token_file: None,
        allow_hosts: Vec::new(),
        retain_bytes: 0,
        retain_age: Duration::ZERO,
    }
}

#[cfg(test)]
mod tests;
