//! Turns an incident into text, JSON, an HTML page and the formats of profilers.
//!
//! Every format is a function of the incident and of options such as [`Style`]. It reads no file,
//! clock or environment, so `memtrace report` gives the same output on every machine. An incident
//! comes from a file and may be hostile: strings are escaped in [`plain`] (for the page, in
//! [`html`]), and what is printed of a list has a cap.

pub mod firefox;
pub mod folded;
pub mod html;
pub mod json;
pub mod paths;
pub mod plain;
pub mod pprof;
pub mod text;

mod allocations;
mod curve;
mod frames;
mod plot;
mod pressure;
mod sections;
mod table;

#[cfg(test)]
mod hostile_tests;

/// What the terminal or file that gets the text can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// Terminal colours.
    pub colour: bool,
    /// Columns a line may have; clamped to 60..=200.
    pub width: usize,
    /// Block characters; ASCII otherwise.
    pub unicode: bool,
}

impl Style {
    /// For a file or a pipe: no colours, 100 columns, block characters.
    pub const PLAIN: Self = Self { colour: false, width: 100, unicode: true };

    fn columns(&self) -> usize {
        self.width.clamp(60, 200)
    }
}

/// The role of a piece of text, which decides its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Paint {
    Plain,
    /// A kill, a loss, a disagreement.
    Alarm,
    /// Headings and totals.
    Strong,
    /// Labels, axes and notes.
    Faint,
    /// Anonymous memory in the curve.
    Anon,
    /// The rest of the usage in the curve.
    Usage,
    /// The limit in the curve.
    Limit,
}

/// One line of output. `columns` is its width on the screen, without colour codes.
#[derive(Clone, Debug, Default)]
struct StyledLine {
    text: String,
    columns: usize,
}

impl StyledLine {
    /// Adds text that is already escaped.
    fn add(&mut self, style: &Style, paint: Paint, text: &str) {
        self.columns += text.chars().count();
        let code = match paint {
            Paint::Plain => "",
            Paint::Alarm => "1;31",
            Paint::Strong => "1",
            Paint::Faint => "2",
            Paint::Anon => "34",
            Paint::Usage => "36",
            Paint::Limit => "31",
        };
        if style.colour && !code.is_empty() && !text.is_empty() {
            self.text.push_str("\x1b[");
            self.text.push_str(code);
            self.text.push('m');
            self.text.push_str(text);
            self.text.push_str("\x1b[0m");
        } else {
            self.text.push_str(text);
        }
    }

    /// Adds spaces until the line is `column` columns wide; none if it is wider.
    fn pad(&mut self, column: usize) {
        let spaces = column.saturating_sub(self.columns);
        self.text.extend(std::iter::repeat_n(' ', spaces));
        self.columns += spaces;
    }

    /// Appends `other` with its colours.
    fn join(&mut self, other: &StyledLine) {
        self.text.push_str(&other.text);
        self.columns += other.columns;
    }
}
