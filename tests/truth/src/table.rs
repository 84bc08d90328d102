//! The table of attributed against touched bytes, and the document that contains it. Pure.

use std::fmt::Write;

use serde_json::{Value, json};

use super::recording::{GrowthSums, ReportedRecording, Truth};
use super::workloads::Workload;

/// Largest error of attributed bytes, percent.
const MOST_ERROR: f64 = 5.0;
/// Smallest share of stacks of native code that reach the outermost frame, percent.
const LEAST_WHOLE: f64 = 99.0;

/// Known misses: (workload, function, reason). They are shown and fail nothing.
const ALLOWED: [(&str, &str, &str); 1] =
    [("musl", "all growth", "musl's libc.a has no unwind tables: a stack ends at the caller of main, as perf's does")];

/// One function of a workload, or the whole workload.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TruthRow {
    pub(crate) workload: String,
    pub(crate) function: String,
    /// Bytes touched; in the row of a whole workload, bytes that the kernel counted.
    pub(crate) truth: u64,
    /// Bytes attributed.
    pub(crate) attributed: u64,
    pub(crate) samples: u64,
    /// Share of the samples whose stack reaches the outermost frame, percent; `None` without
    /// samples.
    pub(crate) whole: Option<f64>,
    /// Share of the workload's growth without a stack, percent.
    pub(crate) unattributed: f64,
    /// What is wrong; empty if nothing is.
    pub(crate) misses: Vec<String>,
    /// Why that is allowed.
    pub(crate) allowed: Option<&'static str>,
}

impl TruthRow {
    /// Error of the attributed bytes, signed percent.
    fn error(&self) -> f64 {
        percent(self.attributed, self.truth) - 100.0
    }

    /// Whether the row fails the run.
    pub(crate) fn fails(&self) -> bool {
        !self.misses.is_empty() && self.allowed.is_none()
    }

    fn verdict(&self) -> String {
        match (self.misses.as_slice(), self.allowed) {
            ([], _) => "ok".to_owned(),
            (misses, Some(why)) => format!("{} (allowed: {why})", misses.join("; ")),
            (misses, None) => format!("MISS: {}", misses.join("; ")),
        }
    }

    fn cells(&self) -> [String; 9] {
        let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
        [
            self.workload.clone(),
            self.function.clone(),
            mib(self.truth),
            mib(self.attributed),
            format!("{:+.2}", self.error()),
            self.samples.to_string(),
            self.whole.map_or_else(|| "-".to_owned(), |whole| format!("{whole:.2}")),
            format!("{:.2}", self.unattributed),
            self.verdict(),
        ]
    }

    fn json(&self) -> Value {
        json!({
            "workload": self.workload, "function": self.function, "truth_bytes": self.truth,
            "attributed_bytes": self.attributed, "error_percent": self.error(), "samples": self.samples,
            "outermost_percent": self.whole, "unattributed_percent": self.unattributed, "misses": self.misses,
            "allowed": self.allowed,
        })
    }
}

fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 100.0 } else { part as f64 * 100.0 / whole as f64 }
}

/// Rows of one workload: one for each function and one for all growth.
pub(crate) fn rows(
    workload: &Workload,
    truth: &Truth,
    recording: &ReportedRecording,
    sums: &GrowthSums,
) -> Vec<TruthRow> {
    let unattributed = percent(recording.unattributed_bytes(), recording.growth.max(1));
    let row = |function: &str, truth: u64, found: super::recording::FunctionGrowth| TruthRow {
        workload: workload.name.to_owned(),
        function: function.to_owned(),
        truth,
        attributed: found.bytes,
        samples: found.samples,
        whole: (found.samples > 0).then(|| percent(found.outermost, found.samples)),
        unattributed,
        misses: Vec::new(),
        allowed: None,
    };
    let touch = truth
        .touch
        .iter()
        .map(|(name, bytes)| row(&format!("`{name}`"), *bytes, sums.touch.get(name).copied().unwrap_or_default()));
    let within = truth.within.iter().map(|(name, bytes)| {
        row(&format!("`{name}` and below"), *bytes, sums.within.get(name).copied().unwrap_or_default())
    });
    let mut rows: Vec<TruthRow> = touch.chain(within).collect();
    rows.sort_by(|a, b| a.function.cmp(&b.function));
    for row in &mut rows {
        if row.error().abs() > MOST_ERROR {
            row.misses.push(format!("{:+.2} % off", row.error()));
        }
    }
    let mut all = row("all growth", recording.growth, sums.all);
    all.misses = recording.contradictions();
    if workload.native && all.whole.is_none_or(|whole| whole < LEAST_WHOLE) {
        let cuts: Vec<String> = sums.cuts.iter().map(|(why, samples)| format!("{why} {samples}")).collect();
        let cuts = if cuts.is_empty() { "none cut".to_owned() } else { format!("cut: {}", cuts.join(", ")) };
        all.misses.push(format!("too few stacks reach the outermost frame ({cuts})"));
    }
    rows.push(all);
    for row in &mut rows {
        let allowed = |(w, f, _): &&(&str, &str, &str)| *w == row.workload && *f == row.function;
        row.allowed = ALLOWED.iter().find(allowed).map(|(.., why)| *why);
    }
    rows
}

/// Row of a workload that could not be recorded.
pub(crate) fn broken(workload: &str, why: String) -> TruthRow {
    TruthRow {
        workload: workload.to_owned(),
        function: "all growth".to_owned(),
        truth: 0,
        attributed: 0,
        samples: 0,
        whole: None,
        unattributed: 0.0,
        misses: vec![why],
        allowed: None,
    }
}

const HEAD: [&str; 9] = [
    "workload",
    "function",
    "truth MiB",
    "attributed MiB",
    "error %",
    "samples",
    "outermost %",
    "unattributed %",
    "verdict",
];

/// The table in Markdown.
pub(crate) fn render(rows: &[TruthRow]) -> String {
    let mut text = format!("| {} |\n|---|---|---:|---:|---:|---:|---:|---:|---|\n", HEAD.join(" | "));
    for row in rows {
        let cells = row.cells().map(|cell| cell.replace('|', "\\|").replace('\n', " "));
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    text
}

/// The rows in JSON.
pub(crate) fn to_json(rows: &[TruthRow]) -> Value {
    rows.iter().map(TruthRow::json).collect()
}

/// Where, when and how a run was made.
pub(crate) struct TruthRun {
    pub(crate) machine: String,
    pub(crate) kernel: String,
    pub(crate) date: String,
    pub(crate) command: String,
}

/// The whole document.
pub(crate) fn document(run: &TruthRun, rows: &[TruthRow], workloads: &[&Workload], comparison: Option<&str>) -> String {
    let TruthRun { machine, kernel, date, command } = run;
    let mut text = format!(
        "# Attribution against known truth\n\n\
         Written by `{command}` on {date}, as it came out. Machine: {machine}. Kernel: {kernel}.\n\n\
         Each workload of `tests/truth/` knows how many fresh bytes each of its functions touches, and says so at its \
         end. It runs under `memtrace record`; the recording's samples are summed up by the innermost of those \
         functions in their stack (rows \"and below\": by any frame). Within {MOST_ERROR} % of the truth is right. \
         \"All growth\" holds what has a stack against what the kernel counted, start-up of the program included; \
         \"outermost\" is the share of stacks that are not cut and end in `_start`, a module's entry point, or where \
         threads and goroutines begin; at least {LEAST_WHOLE} % have to in native code.\n\n{}\n",
        render(rows)
    );
    let _ = writeln!(text, "| workload | built and shipped as | native |\n|---|---|---|");
    for workload in workloads {
        let native = if workload.native { "yes" } else { "no" };
        let more: Vec<String> = workload.env.iter().map(|(name, value)| format!(", {name}={value}")).collect();
        let _ = writeln!(text, "| {} | {}{} | {native} |", workload.name, workload.shipped, more.concat());
    }
    if let Some(comparison) = comparison {
        let _ = write!(text, "\n{comparison}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::recording::tests::report;
    use super::super::workloads::WORKLOADS;
    use super::*;

    fn judged(inner: u64, outer: u64) -> Vec<TruthRow> {
        let recording = ReportedRecording::of(&report()).unwrap();
        let told = format!("{{\"touch\": {{\"inner_touch\": {inner}, \"outer_touch\": {outer}}}}}");
        let truth = Truth::of(&told).unwrap();
        let sums = recording.found(&truth, &mut |_| Some(0x1000));
        rows(&WORKLOADS[0], &truth, &recording, &sums)
    }

    #[test]
    fn five_percent_is_right_and_more_is_a_miss() {
        let rows = judged(420, 700);
        assert_eq!(rows[0].function, "`inner_touch`");
        assert!(rows[0].misses.is_empty(), "{:?}", rows[0]);
        assert_eq!(rows[1].misses, ["-14.29 % off"]);
        assert!(rows[1].fails());
        let text = render(&rows);
        assert!(text.contains("MISS: -14.29 % off"), "{text}");
    }

    #[test]
    fn stacks_that_end_early_are_a_miss_of_native_code_alone() {
        let rows = judged(400, 600);
        let all = rows.last().unwrap();
        assert_eq!(all.misses, ["too few stacks reach the outermost frame (cut: unwind 1)"]);
        let recording = ReportedRecording::of(&report()).unwrap();
        let truth = Truth::of("{\"touch\": {\"inner_touch\": 400}}").unwrap();
        let sums = recording.found(&truth, &mut |_| Some(0x1000));
        let python = WORKLOADS.iter().find(|workload| !workload.native).unwrap();
        assert!(super::rows(python, &truth, &recording, &sums).iter().all(|row| !row.fails()));
    }

    #[test]
    fn a_function_that_was_not_seen_is_a_miss() {
        let recording = ReportedRecording::of(&report()).unwrap();
        let truth = Truth::of("{\"touch\": {\"nowhere\": 400}}").unwrap();
        let sums = recording.found(&truth, &mut |_| None);
        let rows = rows(&WORKLOADS[0], &truth, &recording, &sums);
        assert_eq!((rows[0].attributed, rows[0].whole, rows[0].fails()), (0, None, true));
    }

    #[test]
    fn the_document_has_the_table_as_it_was_printed() {
        let rows = [broken("x", "no | recording".to_owned())];
        let text = |of: &str| of.to_owned();
        let run = TruthRun { machine: text("m"), kernel: text("k"), date: text("d"), command: text("c") };
        let document = document(&run, &rows, &[&WORKLOADS[0]], Some("## More\n"));
        assert!(document.contains(&render(&rows)) && document.ends_with("## More\n"));
        assert!(document.contains("no \\| recording"));
    }
}
