//! Output: its width, colours and characters, and writing it to a file or standard output.

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::Context;

use crate::store::atomic;
use memtrace_report::Style;

/// When to use colours.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Colour {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// The style of text for standard output, or for a file.
pub(super) fn style(colour: Colour, to_file: bool) -> Style {
    if to_file { chosen(colour, None::<std::io::Stdout>) } else { chosen(colour, Some(std::io::stdout())) }
}

/// The style of text for standard error.
pub(super) fn stderr_style() -> Style {
    chosen(Colour::Auto, Some(std::io::stderr()))
}

fn chosen(colour: Colour, stream: Option<impl IsTerminal + AsFd>) -> Style {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let terminal = stream.filter(IsTerminal::is_terminal);
    let colour = match colour {
        Colour::Always => true,
        Colour::Never => false,
        Colour::Auto => {
            terminal.is_some() && variable("NO_COLOR").is_none() && variable("TERM").is_none_or(|term| term != "dumb")
        }
    };
    let Some(terminal) = terminal else {
        return Style { colour, ..Style::PLAIN };
    };
    let width = rustix::termios::tcgetwinsize(terminal).map_or(0, |size| usize::from(size.ws_col));
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(variable);
    Style { colour, width: if width == 0 { Style::PLAIN.width } else { width }, unicode: utf8(locale) }
}

/// Writes to `file`, whole or not at all, or to standard output.
pub(super) fn write(content: &(impl AsRef<[u8]> + ?Sized), file: Option<&Path>) -> anyhow::Result<()> {
    match file {
        Some(path) => {
            atomic::write(path, content.as_ref(), None).with_context(|| format!("failed to write {}", path.display()))
        }
        None => {
            let mut out = std::io::stdout().lock();
            out.write_all(content.as_ref()).and_then(|()| out.flush()).context("failed to write to standard output")
        }
    }
}

/// Whether the locale is UTF-8. Without one, as in a container's shell, the terminal is assumed to be UTF-8.
fn utf8(locale: Option<OsString>) -> bool {
    locale.is_none_or(|locale| {
        let locale = locale.to_string_lossy().to_ascii_lowercase();
        locale.contains("utf-8") || locale.contains("utf8")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_locale_decides_the_characters() {
        assert!(utf8(None));
        assert!(utf8(Some("de_DE.UTF-8".into())));
        assert!(utf8(Some("C.utf8".into())));
        assert!(!utf8(Some("C".into())));
    }

    #[test]
    fn a_file_has_no_colours_unless_asked_for() {
        assert_eq!(style(Colour::Auto, true), Style::PLAIN);
        assert!(style(Colour::Always, true).colour);
    }
}
