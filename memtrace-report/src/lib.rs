//! Incident to text, JSON, a page and the formats of profilers; pure.

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

/// How text may look where it is going.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// Terminal colours.
    pub colour: bool,
    /// Columns; at least 60 are used.
    pub width: usize,
    /// Block characters; ASCII otherwise.
    pub unicode: bool,
}

impl Style {
    /// For a file or a pipe.
    pub const PLAIN: Self = Self { colour: false, width: 100, unicode: true };

    fn columns(&self) -> usize {
        self.width.clamp(60, 200)
    }
}

/// What a piece of text is, for its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Paint {
    Plain,
    /// Bad news.
    Alarm,
    /// What to look at.
    Strong,
    /// What to look past.
    Faint,
    /// Anonymous memory in the curve.
    Anon,
    /// The rest of the usage in the curve.
    Usage,
    /// The limit in the curve.
    Limit,
}

/// A line under construction: text with colours and its width without them.
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

    /// Adds spaces up to a column.
    fn pad(&mut self, column: usize) {
        let spaces = column.saturating_sub(self.columns);
        self.text.extend(std::iter::repeat_n(' ', spaces));
        self.columns += spaces;
    }

    /// Adds a whole line.
    fn join(&mut self, other: &StyledLine) {
        self.text.push_str(&other.text);
        self.columns += other.columns;
    }
}
