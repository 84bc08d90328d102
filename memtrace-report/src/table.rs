//! A table of text cells: columns as wide as their widest cell.

use super::{Paint, Style, StyledLine};

/// How a column's cells stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// Cells that are already escaped.
#[derive(Debug)]
pub(super) struct TextTable {
    head: Vec<(String, Align)>,
    rows: Vec<(Paint, Vec<String>)>,
    /// Columns given up where the line is too long, first first.
    spare: Vec<usize>,
}

impl TextTable {
    pub(super) fn new<const N: usize>(head: [(&str, Align); N]) -> Self {
        Self::of(head.map(|(title, align)| (title.to_owned(), align)).into())
    }

    /// With as many columns as there are titles.
    pub(super) fn of(head: Vec<(String, Align)>) -> Self {
        Self { head, rows: Vec::new(), spare: Vec::new() }
    }

    /// Names the columns to give up first where a line is too long.
    pub(super) fn spare(mut self, columns: &[usize]) -> Self {
        self.spare = columns.into();
        self
    }

    pub(super) fn row<const N: usize>(&mut self, paint: Paint, cells: [String; N]) {
        self.push(paint, cells.into());
    }

    /// A row of a table made by [`TextTable::of`].
    pub(super) fn push(&mut self, paint: Paint, cells: Vec<String>) {
        self.rows.push((paint, cells));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The lines, the head first; columns that are the same in every row and say nothing (`-`) are left out.
    pub(super) fn lines(&self, style: &Style, indent: usize) -> Vec<StyledLine> {
        let mut columns: Vec<(usize, usize, Align)> = (self.head.iter().enumerate())
            .filter(|(at, _)| self.column(*at).any(|cell| cell != "-" && !cell.is_empty()))
            .map(|(at, (title, align))| {
                let widest = self.column(at).map(|cell| cell.chars().count()).max().unwrap_or(0);
                (at, widest.max(title.chars().count()), *align)
            })
            .collect();
        for spare in &self.spare {
            let width: usize = columns.iter().map(|(_, width, _)| width + 2).sum();
            if width + indent > style.columns() + 2 {
                columns.retain(|(at, _, _)| at != spare);
            }
        }
        let head: Vec<String> = self.head.iter().map(|(title, _)| title.clone()).collect();
        std::iter::once((Paint::Strong, &head))
            .chain(self.rows.iter().map(|(paint, cells)| (*paint, cells)))
            .map(|(paint, cells)| {
                let mut text = " ".repeat(indent);
                for (number, (at, width, align)) in columns.iter().enumerate() {
                    let gap = if number == 0 { "" } else { "  " };
                    let cell = cells.get(*at).map_or("", String::as_str);
                    match align {
                        Align::Left => text.push_str(&format!("{gap}{cell:<width$}")),
                        Align::Right => text.push_str(&format!("{gap}{cell:>width$}")),
                    }
                }
                let mut line = StyledLine::default();
                line.add(style, paint, text.trim_end());
                line
            })
            .collect()
    }

    fn column(&self, at: usize) -> impl Iterator<Item = &str> {
        self.rows.iter().filter_map(move |(_, cells)| cells.get(at).map(String::as_str))
    }
}
