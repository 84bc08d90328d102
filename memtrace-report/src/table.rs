//! A table of text cells: columns as wide as their widest cell.

use super::{Paint, Style, StyledLine};

/// Alignment of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// A table being written. Cells must be escaped already.
#[derive(Debug)]
pub(super) struct TextTable {
    head: Vec<(String, Align)>,
    /// Cap: the caller's; each section of the report has one.
    rows: Vec<(Paint, Vec<String>)>,
    /// Columns to drop while a line is too long, in this order.
    droppable: Vec<usize>,
}

impl TextTable {
    pub(super) fn new<const N: usize>(head: [(&str, Align); N]) -> Self {
        Self::of(head.map(|(title, align)| (title.to_owned(), align)).into())
    }

    /// A table whose number of columns is known at run time.
    pub(super) fn of(head: Vec<(String, Align)>) -> Self {
        Self { head, rows: Vec::new(), droppable: Vec::new() }
    }

    /// Sets the columns to drop while a line is too long, in this order.
    pub(super) fn droppable(mut self, columns: &[usize]) -> Self {
        self.droppable = columns.into();
        self
    }

    pub(super) fn row<const N: usize>(&mut self, paint: Paint, cells: [String; N]) {
        self.push(paint, cells.into());
    }

    /// Adds a row to a table made by [`TextTable::of`].
    pub(super) fn push(&mut self, paint: Paint, cells: Vec<String>) {
        self.rows.push((paint, cells));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The lines, titles first. A column whose cells are all empty or `-` is left out.
    pub(super) fn lines(&self, style: &Style, indent: usize) -> Vec<StyledLine> {
        let mut columns: Vec<(usize, usize, Align)> = (self.head.iter().enumerate())
            .filter(|(at, _)| self.column(*at).any(|cell| cell != "-" && !cell.is_empty()))
            .map(|(at, (title, align))| {
                let widest = self.column(at).map(|cell| cell.chars().count()).max().unwrap_or(0);
                (at, widest.max(title.chars().count()), *align)
            })
            .collect();
        for dropped in &self.droppable {
            let width: usize = columns.iter().map(|(_, width, _)| width + 2).sum();
            if width + indent > style.columns() + 2 {
                columns.retain(|(at, _, _)| at != dropped);
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
