//! `docs/flags.md`, made from the command line and the table of settings.

use std::fmt::Write as _;

use clap::{Arg, ArgAction, Command, CommandFactory};

use super::Cli;
use super::config::Setting;
use super::config::settings::SETTINGS;

const INTRO: &str = "\
# Flags and configuration

Every verb and its flags, with what `--help` has no room for. This page is made from the same definitions; a test
compares the two. [reference.md](reference.md) has the files, the HTTP API and the exit codes.

- **SIZE** is a number of bytes, or a number with `K`, `M`, `G` or `T` (powers of 1024): `4096`, `450M`, `1.5GiB`.
- **SPAN** is a number with `ns`, `us`, `ms`, `s`, `m`, `h` or `d`: `250ms`, `30s`, `2d`.
- **PERCENT** is a share of one CPU: `1%`; `0.5` is half a percent.
- **page** is the page size of the running kernel, usually 4K.
";

const AGENT: &str = "\
Every flag with a key can also be set in a TOML file, which `--config` names. A flag wins over the file, the file over
the default. An unknown key, or a value that is out of range, ends the start with exit code 2 and a message that names
the flag, or the file and the key.

`memtrace agent --print-config` prints the effective configuration as such a file, each key with its meaning; it needs
no privileges and starts nothing.

```toml
# /etc/memtrace.toml
state_dir = \"/srv/memtrace\"
before = \"1m\"
without = [\"map\"]
retain_size = \"2G\"
no_spikes = true
```
";

fn setting(verb: &str, arg: &Arg) -> Option<&'static Setting> {
    let found = SETTINGS.iter().find(|setting| setting.key == arg.get_id().as_str());
    found.filter(|setting| verb != "incidents" && verb != "report" || ["state_dir", "socket"].contains(&setting.key))
}

/// `-o, --output FILE`, or the name of an argument without a flag.
fn usage(arg: &Arg) -> String {
    let names: Vec<&str> = arg.get_value_names().unwrap_or_default().iter().map(clap::builder::Str::as_str).collect();
    let value = match arg.get_action() {
        ArgAction::Set | ArgAction::Append => names.join(" "),
        _ => String::new(),
    };
    let short = arg.get_short().map(|short| format!("-{short}"));
    let long = arg.get_long().map(|long| format!("--{long}"));
    let flags: Vec<String> = short.into_iter().chain(long).collect();
    format!("{} {value}", flags.join(", ")).trim().to_owned()
}

/// A cell of a table in Markdown.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

fn verb(out: &mut String, command: &Command) {
    let name = command.get_name();
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let _ = writeln!(out, "\n## memtrace {name}\n\n{about}.");
    if name == "agent" {
        let _ = write!(out, "\n{AGENT}");
    }
    let args: Vec<&Arg> =
        command.get_arguments().filter(|arg| !["help", "version"].contains(&arg.get_id().as_str())).collect();
    if args.is_empty() {
        let _ = writeln!(out, "\nIt takes no flags.");
        return;
    }
    let keys = name == "agent";
    let _ = match keys {
        true => write!(out, "\n| flag | key | default | values | meaning |\n|---|---|---|---|---|\n"),
        false => write!(out, "\n| flag | default | values | meaning |\n|---|---|---|---|\n"),
    };
    for arg in args {
        let setting = setting(name, arg);
        let default: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
        let default = if matches!(arg.get_action(), ArgAction::SetTrue) || default.is_empty() {
            String::new()
        } else {
            format!("`{}`", default.join(","))
        };
        let values: Vec<String> = arg
            .get_possible_values()
            .iter()
            .filter(|value| !value.is_hide_set() && !matches!(arg.get_action(), ArgAction::SetTrue))
            .map(|value| format!("`{}`", value.get_name()))
            .collect();
        let values = setting.and_then(Setting::range).unwrap_or_else(|| values.join(", "));
        let meaning = match setting {
            Some(setting) if setting.note.is_empty() => format!("{}.", setting.help),
            Some(setting) => format!("{}. {}", setting.help, setting.note),
            None => format!("{}.", arg.get_help().map(ToString::to_string).unwrap_or_default()),
        };
        let key = match (keys, setting) {
            (true, Some(setting)) => format!("`{}` | ", setting.key),
            (true, None) => " | ".to_owned(),
            (false, _) => String::new(),
        };
        let _ = writeln!(
            out,
            "| `{}` | {key}{} | {} | {} |",
            cell(&usage(arg)),
            cell(&default),
            cell(&values),
            cell(&meaning)
        );
    }
}

fn flags() -> String {
    let mut command = Cli::command();
    command.build();
    let mut out = INTRO.to_owned();
    for command in command.get_subcommands().filter(|command| !command.is_hide_set() && command.get_name() != "help") {
        verb(&mut out, command);
    }
    out
}

#[test]
fn the_published_flags_are_these() {
    crate::blessed::check("docs/flags.md", &flags());
}
