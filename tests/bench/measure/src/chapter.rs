//! What a benchmark found, as one chapter of docs/benchmarks.md: text, tables, and goals with what
//! was measured.

use serde_json::{Value, json};

/// Results of one benchmark.
#[derive(Clone, Debug, Default)]
pub(crate) struct Chapter {
    /// Heading.
    pub(crate) title: String,
    /// Paragraphs: how it was measured, what the figures mean, what was left out and why.
    pub(crate) text: Vec<String>,
    /// Tables.
    pub(crate) tables: Vec<ChapterTable>,
    /// Goals and whether they are met.
    pub(crate) goals: Vec<Goal>,
}

/// A table.
#[derive(Clone, Debug, Default)]
pub(crate) struct ChapterTable {
    /// Caption.
    pub(crate) title: String,
    /// Headings.
    pub(crate) columns: Vec<String>,
    /// Rows of cells, as many in each as there are columns.
    pub(crate) rows: Vec<Vec<Cell>>,
}

/// A cell of a table.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Cell {
    /// Text, used as it is.
    Text(String),
    /// A measured figure.
    Figure(Figure),
    /// An unknown value, with the reason.
    Unknown(String),
}

/// A figure: the median of several rounds, and their spread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Figure {
    /// The median.
    pub(crate) median: f64,
    /// Smallest round.
    pub(crate) least: f64,
    /// Largest round.
    pub(crate) most: f64,
    /// `ns`, `ms`, `s`, `%`, `bytes`, `x` (a ratio), or the name of what is counted.
    pub(crate) unit: &'static str,
}

impl Figure {
    /// Of the rounds of a measurement; `None` if there are none.
    pub(crate) fn of(rounds: &[f64], unit: &'static str) -> Option<Self> {
        let mut sorted: Vec<f64> = rounds.iter().copied().filter(|value| value.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let upper = *sorted.get(middle)?;
        let median =
            if sorted.len() % 2 == 1 { upper } else { f64::midpoint(*sorted.get(middle.checked_sub(1)?)?, upper) };
        Some(Self { median, least, most, unit })
    }

    /// A figure without spread.
    pub(crate) fn exactly(value: f64, unit: &'static str) -> Self {
        Self { median: value, least: value, most: value, unit }
    }
}

impl From<Option<Figure>> for Cell {
    fn from(figure: Option<Figure>) -> Self {
        figure.map_or_else(|| Self::Unknown("not measured".to_owned()), Self::Figure)
    }
}

impl From<Figure> for Cell {
    fn from(figure: Figure) -> Self {
        Self::Figure(figure)
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// A goal and the result.
#[derive(Clone, Debug)]
pub(crate) struct Goal {
    /// What is measured, and how good it has to be.
    pub(crate) what: String,
    /// What was found.
    pub(crate) found: String,
    /// Whether it is met; `None` if it could not be measured.
    pub(crate) met: Option<bool>,
}

impl Chapter {
    /// The chapter in the JSON that `cargo xtask bench` reads.
    pub(crate) fn to_json(&self) -> Value {
        let cell = |cell: &Cell| match cell {
            Cell::Text(text) => json!(text),
            Cell::Unknown(why) => json!({ "unknown": why }),
            Cell::Figure(f) => json!({ "median": f.median, "least": f.least, "most": f.most, "unit": f.unit }),
        };
        let row = |row: &Vec<Cell>| Value::Array(row.iter().map(cell).collect());
        let table = |table: &ChapterTable| {
            let rows: Vec<Value> = table.rows.iter().map(row).collect();
            json!({ "title": table.title, "columns": table.columns, "rows": rows })
        };
        let goal = |goal: &Goal| json!({ "what": goal.what, "found": goal.found, "met": goal.met });
        json!({
            "title": self.title,
            "text": self.text,
            "tables": self.tables.iter().map(table).collect::<Vec<_>>(),
            "goals": self.goals.iter().map(goal).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_the_median_of_its_rounds() {
        let figure = |rounds: &[f64]| Figure::of(rounds, "ns");
        assert_eq!(figure(&[3.0, 1.0, 2.0]), Some(Figure { median: 2.0, least: 1.0, most: 3.0, unit: "ns" }));
        assert_eq!(figure(&[4.0, 1.0]).map(|f| f.median), Some(2.5));
        assert_eq!(figure(&[f64::NAN]), None);
        assert_eq!(figure(&[]), None);
    }

    #[test]
    fn an_unknown_is_not_zero_in_json() {
        let row = vec![Cell::from("x"), Cell::from(None), Cell::from(Figure::exactly(1.5, "ms"))];
        let table = ChapterTable { rows: vec![row], ..ChapterTable::default() };
        let found = Chapter { tables: vec![table], ..Chapter::default() }.to_json();
        assert_eq!(found.pointer("/tables/0/rows/0/0"), Some(&json!("x")));
        assert_eq!(found.pointer("/tables/0/rows/0/1/unknown"), Some(&json!("not measured")));
        assert_eq!(found.pointer("/tables/0/rows/0/2/median"), Some(&json!(1.5)));
    }
}
