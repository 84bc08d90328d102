//! Renders chapters as Markdown, for the terminal and for docs/benchmarks.md. Pure.

use std::fmt::Write;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// A chapter as a benchmark printed it, in JSON.
#[derive(Debug, Clone)]
pub(crate) struct PrintedChapter {
    /// Heading.
    pub(crate) title: String,
    /// The whole chapter.
    pub(crate) json: Value,
    /// Whether the benchmark failed; the only text says why.
    pub(crate) is_broken: bool,
}

/// How, when and where a document was made.
pub(crate) struct BenchRun {
    pub(crate) command: String,
    pub(crate) date: String,
    pub(crate) machine: String,
    pub(crate) seconds: u64,
}

impl PrintedChapter {
    /// Reads what a benchmark printed. Fails if there is no title.
    pub(crate) fn read(json: Value) -> Result<Self> {
        let title = json.get("title").and_then(Value::as_str).context("a chapter without a title")?.to_owned();
        Ok(Self { title, json, is_broken: false })
    }

    /// A chapter for a benchmark that failed.
    pub(crate) fn broken(name: &str, error: &anyhow::Error) -> Self {
        let text = format!("Could not be measured: {error:#}");
        Self { title: name.to_owned(), json: json!({ "title": name, "text": [text] }), is_broken: true }
    }

    fn list(&self, key: &str) -> &[Value] {
        list(&self.json, key)
    }
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or("")
}

/// The document. The goals of all chapters come first, because they are what readers look for.
pub(crate) fn document<'a>(head: &BenchRun, chapters: impl Iterator<Item = &'a PrintedChapter>) -> String {
    let chapters: Vec<&PrintedChapter> = chapters.collect();
    let BenchRun { command, date, machine, seconds } = head;
    let mut out = format!(
        "# Benchmarks\n\nWritten by `{command}` in {} min on {date}, as it came out. {machine}.\n\nA figure is the median \
         of the rounds of one run, interleaved with what it is compared with; in brackets the smallest and the largest. \
         These machines are noisy: trust ratios and spreads, not single figures.\n",
        seconds.div_ceil(60)
    );
    let goals: Vec<&Value> = chapters.iter().flat_map(|chapter| chapter.list("goals")).collect();
    if !goals.is_empty() {
        out.push_str("\n## Goals\n\n| goal | found | met |\n|---|---|---|\n");
        for goal in goals {
            let met = match goal.get("met").and_then(Value::as_bool) {
                Some(true) => "yes",
                Some(false) => "**no**",
                None => "not measured",
            };
            let _ = writeln!(out, "| {} | {} | {met} |", text(goal, "what"), text(goal, "found"));
        }
    }
    for found in chapters {
        let _ = write!(out, "\n{}", chapter(found));
    }
    out
}

/// One chapter in Markdown.
pub(crate) fn chapter(chapter: &PrintedChapter) -> String {
    let mut out = format!("## {}\n", chapter.title);
    for paragraph in chapter.list("text").iter().filter_map(Value::as_str) {
        let _ = write!(out, "\n{paragraph}\n");
    }
    for table in chapter.list("tables") {
        let columns: Vec<&str> = list(table, "columns").iter().filter_map(Value::as_str).collect();
        if !text(table, "title").is_empty() {
            let _ = write!(out, "\n**{}**\n", text(table, "title"));
        }
        let _ = write!(out, "\n| {} |\n|{}\n", columns.join(" | "), "---|".repeat(columns.len()));
        for row in list(table, "rows") {
            let cells: Vec<String> = row.as_array().into_iter().flatten().map(cell).collect();
            let _ = writeln!(out, "| {} |", cells.join(" | "));
        }
    }
    out
}

fn cell(cell: &Value) -> String {
    if let Some(text) = cell.as_str() {
        // a cell must not break its row
        return text.trim().replace('|', "\\|").replace('\n', " ");
    }
    if let Some(why) = cell.get("unknown").and_then(Value::as_str) {
        return format!("– ({why})");
    }
    let number = |key: &str| cell.get(key).and_then(Value::as_f64);
    let (Some(median), Some(least), Some(most)) = (number("median"), number("least"), number("most")) else {
        return "–".to_owned();
    };
    let unit = text(cell, "unit");
    if unit == "bytes" {
        let mib = |bytes: f64| format!("{:.1}", bytes / f64::from(1 << 20));
        return spread(&mib(median), &mib(least), &mib(most), " MiB");
    }
    let unit = match unit {
        "x" => "×".to_owned(),
        "" => String::new(),
        "%" => " %".to_owned(),
        unit => format!(" {unit}"),
    };
    spread(&figure(median), &figure(least), &figure(most), &unit)
}

fn spread(median: &str, least: &str, most: &str, unit: &str) -> String {
    if least == most { format!("{median}{unit}") } else { format!("{median}{unit} ({least} to {most})") }
}

/// A number with four significant digits, without trailing zeros.
fn figure(value: f64) -> String {
    let digits = match value.abs() {
        value if value == 0.0 || value >= 1000.0 => 0,
        value if value >= 100.0 => 1,
        value if value >= 10.0 => 2,
        value if value >= 0.1 => 3,
        _ => 4,
    };
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_say_their_spread_and_their_unit() {
        let one = |median: f64, least: f64, most: f64, unit: &str| {
            cell(&json!({ "median": median, "least": least, "most": most, "unit": unit }))
        };
        assert_eq!(one(1.2345, 1.2, 1.3, "x"), "1.234× (1.2 to 1.3)");
        assert_eq!(one(1234.5, 1234.5, 1234.5, "ns"), "1234 ns");
        assert_eq!(one(0.0, 0.0, 0.0, ""), "0");
        assert_eq!(one(3_145_728.0, 1_048_576.0, 4_194_304.0, "bytes"), "3.0 MiB (1.0 to 4.0)");
        assert_eq!(cell(&json!({ "unknown": "no kprobes" })), "– (no kprobes)");
        assert_eq!(cell(&json!("a|b\nc\n")), "a\\|b c");
    }

    #[test]
    fn a_missed_goal_says_so() {
        let json = json!({ "title": "T", "goals": [{ "what": "w", "found": "f", "met": false }] });
        let head = BenchRun { command: "c".into(), date: "d".into(), machine: "m".into(), seconds: 61 };
        let found = document(&head, [PrintedChapter::read(json).unwrap()].iter());
        assert!(found.contains("| w | f | **no** |"), "{found}");
        assert!(found.contains("in 2 min"), "{found}");
    }
}
