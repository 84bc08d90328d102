//! The summary of a run: a line for each layer with its seconds, and the reasons why the run
//! failed. Pure.

use super::layer::{Layer, LayerOutcome};
use memtrace_harness::libtest::Tally;

/// Most lines shown of a test's output at its first try.
const MOST_SAID: usize = 4;

/// Results of all layers.
pub(crate) struct RunSummary {
    pub(crate) lines: Vec<String>,
    pub(crate) total: Tally,
    /// Why the run failed; empty if it did not.
    pub(crate) troubles: Vec<String>,
}

/// Sums up the layers. With `ci`, a layer that could not run is a failure.
pub(crate) fn sum_up(layers: &[Layer], ci: bool) -> RunSummary {
    let mut summary = RunSummary { lines: Vec::new(), total: Tally::default(), troubles: Vec::new() };
    for Layer { name, ended, remarks, second_tries, took } in layers {
        let seconds = took.as_secs();
        match ended {
            LayerOutcome::Ran { tally, success } => {
                summary.total = summary.total.plus(*tally);
                summary.lines.push(format!("{seconds:>5} s  {name}: {tally}"));
                if !success {
                    let what = if tally.failed == 0 { "was cut short" } else { "has failures" };
                    summary.troubles.push(format!("{name} {what}"));
                }
            }
            LayerOutcome::Done => summary.lines.push(format!("{seconds:>5} s  {name}: ok")),
            LayerOutcome::Impossible { why } => {
                summary.lines.push(format!("{seconds:>5} s  {name}: NOT RUN, {why}"));
                if ci {
                    summary.troubles.push(format!("{name} could not run here and CI=true: {why}"));
                }
            }
            LayerOutcome::LeftOut { why } => summary.lines.push(format!("{seconds:>5} s  {name}: NOT RUN, {why}")),
        }
        summary.lines.extend(remarks.iter().map(|remark| format!("           {remark}")));
        for second_try in second_tries {
            summary.lines.push(format!("           {second_try}"));
            let said = second_try.said.iter().take(MOST_SAID);
            summary.lines.extend(said.map(|line| format!("             {line}")));
        }
    }
    if summary.total.passed + summary.total.failed == 0 {
        summary.troubles.push("no test ran".to_owned());
    }
    summary
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use memtrace_harness::libtest::SecondTry;

    fn ran(passed: u64, failed: u64, success: bool) -> Layer {
        let tally = Tally { passed, failed, skipped: 0 };
        Layer { took: Duration::from_secs(75), ..Layer::ended("units", LayerOutcome::Ran { tally, success }) }
    }

    #[test]
    fn a_layer_that_could_not_run_fails_only_ci() {
        let kernel = Layer::ended("in the kernel", LayerOutcome::Impossible { why: "not root".to_owned() });
        let layers = [ran(1, 0, true), kernel];
        assert!(sum_up(&layers, false).troubles.is_empty());
        assert!(sum_up(&layers, false).lines.iter().any(|line| line.contains("NOT RUN")));
        assert_eq!(sum_up(&layers, true).troubles.len(), 1);
    }

    #[test]
    fn a_layer_that_was_not_wanted_fails_nothing() {
        let matrix = Layer::ended("matrix", LayerOutcome::LeftOut { why: "as was asked for" });
        assert!(sum_up(&[ran(1, 0, true), matrix], true).troubles.is_empty());
    }

    #[test]
    fn a_layer_is_told_with_its_seconds_what_did_not_run_and_what_ran_twice() {
        let said = vec!["Error: late".to_owned()];
        let second_try = SecondTry { test: "kernel_x::a".to_owned(), said, passed: true };
        let remarks = vec!["not run: swap: no disk".to_owned()];
        let layer = Layer { remarks, second_tries: vec![second_try], ..ran(1, 0, true) };
        let setup = Layer::of_work("set-up", || Ok(()));
        assert_eq!(
            sum_up(&[setup, layer], true).lines,
            [
                "    0 s  set-up: ok",
                "   75 s  units: 1 passed, 0 failed, 0 skipped",
                "           not run: swap: no disk",
                "           second try of kernel_x::a, which had failed: passed",
                "             Error: late",
            ]
        );
    }

    #[test]
    fn a_layer_that_failed_without_a_failed_test_fails() {
        assert_eq!(sum_up(&[ran(1, 0, false)], false).troubles, ["units was cut short"]);
        assert_eq!(sum_up(&[ran(1, 1, false)], false).troubles, ["units has failures"]);
        let broken = Layer::of_work("a layer of a unit test", || Err(anyhow::anyhow!("as it should")));
        assert_eq!(sum_up(&[ran(1, 0, true), broken], false).troubles, ["a layer of a unit test has failures"]);
    }

    #[test]
    fn a_run_of_no_test_fails() {
        assert_eq!(sum_up(&[ran(0, 0, true)], false).troubles, ["no test ran"]);
    }
}
