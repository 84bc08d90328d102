//! Settings as flags: what clap is told about them, and which of them were on the command line.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};

use clap::builder::{PathBufValueParser, PossibleValuesParser};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, ValueHint};

use super::settings::SETTINGS;
use super::{Given, Origin, Setting, SettingKind, Values, Verbs};
use crate::kernel::hooks::Hook;

/// The settings of the verb `VERB` that were on the command line; flatten it into the arguments of the verb.
#[derive(Clone, Debug, Default)]
pub(in crate::cli) struct Flags<const VERB: Verbs> {
    /// Text by key; the parts of a list are joined by commas. Cap: one for each of [`SETTINGS`].
    given: BTreeMap<&'static str, OsString>,
}

impl<const VERB: Verbs> Flags<VERB> {
    pub(super) fn values(&self) -> Values {
        let value =
            |(key, text): (&&'static str, &OsString)| (*key, Given { text: text.clone(), origin: Origin::Flag });
        self.given.iter().map(value).collect()
    }

    fn settings() -> impl Iterator<Item = &'static Setting> {
        SETTINGS.iter().filter(|setting| setting.verbs & VERB != 0)
    }

    /// As if these had been on the command line, by key.
    #[cfg(test)]
    pub(in crate::cli) fn with(given: &[(&'static str, &OsStr)]) -> Self {
        Self { given: given.iter().map(|(key, text)| (*key, (*text).to_owned())).collect() }
    }
}

impl<const VERB: Verbs> clap::Args for Flags<VERB> {
    fn augment_args(command: Command) -> Command {
        command.args(Self::settings().map(|setting| arg(setting, VERB)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<const VERB: Verbs> clap::FromArgMatches for Flags<VERB> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Self::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for setting in Self::settings() {
            // Defaults are for `--help`: what counts is laid over the configuration file.
            if matches.value_source(setting.key) == Some(ValueSource::CommandLine)
                && let Some(parts) = matches.get_raw(setting.key)
            {
                let parts: Vec<&OsStr> = parts.collect();
                self.given.insert(setting.key, parts.join(OsStr::new(",")));
            }
        }
        Ok(())
    }
}

/// What clap is told about a setting. Values are checked here, so that clap names the flag of one that is wrong.
fn arg(setting: &'static Setting, verb: Verbs) -> Arg {
    let help = match setting.range() {
        Some(range) => format!("{} [{range}]", setting.help),
        None => setting.help.to_owned(),
    };
    let mut arg = Arg::new(setting.key).long(setting.flag).help(help);
    if let Some(name) = setting.value_name() {
        arg = arg.value_name(name);
    }
    if let Some(default) = setting.default_for(verb) {
        arg = arg.default_value(default);
    }
    match setting.kind {
        SettingKind::Switch { .. } => arg.action(ArgAction::SetTrue),
        SettingKind::Dir { .. } => arg.value_parser(PathBufValueParser::new()).value_hint(ValueHint::DirPath),
        SettingKind::File { .. } => arg.value_parser(PathBufValueParser::new()).value_hint(ValueHint::FilePath),
        SettingKind::Socket { .. } => arg
            .value_parser(|text: &str| setting.check(OsStr::new(text)).map(|()| text.to_owned()))
            .value_hint(ValueHint::FilePath),
        SettingKind::Hooks { .. } => arg
            .action(ArgAction::Append)
            .value_delimiter(',')
            .value_parser(PossibleValuesParser::new(Hook::ALL.map(Hook::name))),
        SettingKind::Names { .. } => arg
            .action(ArgAction::Append)
            .value_delimiter(',')
            .value_parser(|text: &str| setting.check(OsStr::new(text)).map(|()| text.to_owned())),
        _ => arg.value_parser(|text: &str| setting.check(OsStr::new(text)).map(|()| text.to_owned())),
    }
}
