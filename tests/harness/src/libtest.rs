//! Reads libtest's output line by line: how many tests passed, which failed, which reported that
//! they could not run.

use std::collections::{BTreeMap, BTreeSet};

/// Prefix of the line by which a passing test reports that it tested nothing, before `WHAT: WHY`.
/// Printed by `figures::not_run_here` of the tests.
const NOT_RUN_HERE: &str = "  | NOT RUN HERE ";

/// Most lines kept of a failed test's output.
const MOST_SAID: usize = 15;

/// Numbers of tests by result.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Tally {
    /// Tests that ran and passed.
    pub passed: u64,
    /// Tests that ran and failed.
    pub failed: u64,
    /// Tests that were ignored, or passed without having tested because this machine cannot run
    /// them.
    pub skipped: u64,
}

impl Tally {
    /// The sum of two runs.
    pub fn plus(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            skipped: self.skipped + other.skipped,
        }
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// One test and its result.
#[derive(Debug, PartialEq, Eq)]
pub struct EndedTest {
    /// The test's path in its executable.
    pub test: String,
    /// `ok`, `FAILED`, `ignored` or `not run`.
    pub word: String,
}

/// Reads the output of test executables, any number of them in sequence.
#[derive(Debug, Default, Clone)]
pub struct LibtestReader {
    /// Sum of the closing lines, with tests that did not run moved from passed to skipped.
    closed: Tally,
    /// Executables that have printed `running N tests` and no closing line yet.
    open: u64,
    /// The test whose name was printed without a result so far.
    running: Option<String>,
    /// Tests that printed NOT RUN HERE since the last closing line.
    idle: BTreeSet<String>,
    /// `WHAT: WHY` of everything that did not run, in order of appearance.
    pub not_run: Vec<String>,
    /// Names of the failed tests.
    pub failed: BTreeSet<String>,
    /// Output of each failed test, at most [`MOST_SAID`] lines.
    pub said: BTreeMap<String, Vec<String>>,
    /// The failed test whose output is being read.
    listed: Option<String>,
}

/// A failed test that was run once more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecondTry {
    /// `EXECUTABLE::TEST`, or the test's name alone where the executable is not known.
    pub test: String,
    /// Its output when it failed first, or the reason why the executable was repeated.
    pub said: Vec<String>,
    /// Whether it passed the second time.
    pub passed: bool,
}

impl std::fmt::Display for SecondTry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ended = if self.passed { "passed" } else { "failed again" };
        write!(f, "second try of {}, which had failed: {ended}", self.test)
    }
}

/// What part of an executable is run once more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryExtent {
    /// Only the tests that failed.
    Failed,
    /// All of it, because the executable died.
    Whole,
}

/// Result of an executable that was run once more.
pub struct RetriedRun {
    /// The second run's tally. If only failed tests were repeated: the first run's tally, corrected
    /// by the second's results.
    pub tally: Tally,
    /// One entry for each failed test; one for the executable if it died before any test failed.
    pub second_tries: Vec<SecondTry>,
}

/// Combines the first and the second run of an executable.
pub fn retried(executable: &str, first: &LibtestReader, again: &LibtestReader, extent: RetryExtent) -> RetriedRun {
    let (mut tally, second) = (first.tally(), again.tally());
    let ran = second.passed + second.failed + second.skipped;
    // A filter that matches no test makes libtest succeed, so success alone proves nothing: the
    // tests must have run.
    let ended =
        again.open == 0 && if extent == RetryExtent::Whole { ran > 0 } else { ran == first.failed.len() as u64 };
    match extent {
        RetryExtent::Whole => tally = second,
        RetryExtent::Failed if ended => {
            tally.failed = tally.failed.saturating_sub(second.passed + second.skipped);
            tally.passed += second.passed;
            tally.skipped += second.skipped;
        }
        RetryExtent::Failed => {}
    }
    let second_try = |test: &String| SecondTry {
        test: format!("{executable}::{test}"),
        said: first.said.get(test).cloned().unwrap_or_default(),
        passed: ended && !again.failed.contains(test),
    };
    let mut second_tries: Vec<SecondTry> = first.failed.iter().map(second_try).collect();
    if second_tries.is_empty() {
        let said = vec!["it died before its end".to_owned()];
        second_tries.push(SecondTry { test: executable.to_owned(), said, passed: ended && again.failed.is_empty() });
    }
    RetriedRun { tally, second_tries }
}

impl LibtestReader {
    /// Reads the next line. Returns the test whose result it completes, if it does.
    pub fn line(&mut self, line: &str) -> Option<EndedTest> {
        let line = line.trim_end_matches(['\r', '\n']);
        self.keep_output(line);
        if line.strip_prefix("running ").is_some_and(|rest| rest.ends_with(" tests") || rest == "1 test") {
            self.open += 1;
        }
        if let Some((_, said)) = line.split_once(NOT_RUN_HERE) {
            self.not_run.push(said.to_owned());
            let test = self.started(line).or_else(|| self.running.clone());
            // without a name, each report counts as a test of its own
            self.idle.insert(test.unwrap_or_else(|| format!("#{}", self.not_run.len())));
        }
        if let Some(mut tally) = result_of(line) {
            let idle = tally.passed.min(std::mem::take(&mut self.idle).len() as u64);
            tally.passed -= idle;
            tally.skipped += idle;
            self.closed = self.closed.plus(tally);
            self.open = self.open.saturating_sub(1);
            self.running = None;
            return None;
        }
        if let Some(test) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            self.failed.insert(test.to_owned());
            return None;
        }
        let word = match self.started(line) {
            Some(test) => {
                let rest = line.split_once(" ... ").map_or("", |(_, rest)| rest).to_owned();
                self.running = Some(test);
                rest
            }
            None => line.to_owned(),
        };
        let word = ["ok", "FAILED", "ignored"].into_iter().find(|known| {
            word.strip_prefix(known)
                .is_some_and(|rest| rest.is_empty() || (*known == "ignored" && rest.starts_with(',')))
        })?;
        let test = self.running.take()?;
        if word == "FAILED" {
            self.failed.insert(test.clone());
        }
        let word = if word == "ok" && self.idle.contains(&test) { "not run" } else { word };
        Some(EndedTest { test, word: word.to_owned() })
    }

    /// Collects the output of failed tests, which libtest lists at the end: `---- TEST stdout
    /// ----`, then the lines.
    fn keep_output(&mut self, line: &str) {
        if let Some(test) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            self.listed = Some(test.to_owned());
        } else if line == "failures:" || line.starts_with("test result: ") {
            self.listed = None;
        } else if let (Some(test), false) = (&self.listed, line.is_empty()) {
            let said = self.said.entry(test.clone()).or_default();
            if said.len() < MOST_SAID {
                said.push(line.to_owned());
            }
        }
    }

    /// Tests of all executables that have printed their closing line.
    pub fn tally(&self) -> Tally {
        self.closed
    }

    /// The failed tests, if there are 1 to `most` of them and nothing else went wrong.
    pub fn few_failed(&self, most: usize) -> Option<&BTreeSet<String>> {
        let told = self.open == 0 && self.failed.len() as u64 == self.closed.failed;
        (told && (1..=most).contains(&self.failed.len())).then_some(&self.failed)
    }

    fn started(&self, line: &str) -> Option<String> {
        let (test, _) = line.strip_prefix("test ")?.split_once(" ... ")?;
        (!test.is_empty() && !test.contains(' ')).then(|| test.to_owned())
    }
}

/// Reads the closing line: `test result: ok. 3 passed; 0 failed; 1 ignored; ...`.
fn result_of(line: &str) -> Option<Tally> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut tally = Tally::default();
    for part in counts.split(';') {
        let mut words = part.split_whitespace();
        let (Some(Ok(count)), Some(what)) = (words.next().map(str::parse::<u64>), words.next()) else {
            continue;
        };
        match what {
            "passed" => tally.passed = count,
            "failed" => tally.failed = count,
            "ignored" => tally.skipped = count,
            _ => {}
        }
    }
    Some(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (LibtestReader, Vec<String>) {
        let mut reader = LibtestReader::default();
        let ended = text.lines().filter_map(|line| reader.line(line)).map(|e| format!("{} {}", e.test, e.word));
        let ended = ended.collect();
        (reader, ended)
    }

    #[test]
    fn closing_lines_are_counted() {
        let line = "test result: FAILED. 12 passed; 2 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.10s";
        assert_eq!(result_of(line), Some(Tally { passed: 12, failed: 2, skipped: 1 }));
        assert_eq!(result_of("test engine::test_result ... ok"), None);
        assert_eq!(result_of("running 3 tests"), None);
    }

    #[test]
    fn tests_that_print_past_the_harness_are_followed() {
        let (reader, ended) = read(
            "running 3 tests\r\ntest a_kill ...   | 3 rounds\r\n  | more\r\nok\r\ntest b ... ok\r\ntest c ... FAILED\r\n\
             failures:\r\n---- c stdout ----\r\nError: no\r\ntest result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured\r\n",
        );
        assert_eq!(ended, ["a_kill ok", "b ok", "c FAILED"]);
        assert_eq!(reader.tally(), Tally { passed: 2, failed: 1, skipped: 0 });
        assert_eq!(reader.failed.iter().collect::<Vec<_>>(), ["c"]);
    }

    #[test]
    fn a_test_that_could_not_run_is_skipped_once() {
        let (reader, ended) = read(
            "test a ...   | NOT RUN HERE group kills: no cgroup v2\n  | NOT RUN HERE more: no cgroup v2\nok\n\
             test b ... ok\ntest result: ok. 2 passed; 0 failed; 0 ignored\n\
             test d ... ignored, needs hours\ntest result: ok. 0 passed; 0 failed; 1 ignored\n",
        );
        assert_eq!(ended, ["a not run", "b ok", "d ignored"]);
        assert_eq!(reader.tally(), Tally { passed: 1, failed: 0, skipped: 2 });
        assert_eq!(reader.not_run, ["group kills: no cgroup v2", "more: no cgroup v2"]);
    }

    #[test]
    fn a_few_failures_are_told_unless_more_went_wrong() {
        let failed =
            "running 2 tests\ntest a ... ok\ntest b ... FAILED\ntest result: FAILED. 1 passed; 1 failed; 0 ignored\n";
        assert_eq!(read(failed).0.few_failed(1).map(BTreeSet::len), Some(1));
        assert_eq!(read(failed).0.few_failed(0), None);
        assert_eq!(
            read("running 1 test\ntest a ... ok\ntest result: ok. 1 passed; 0 failed; 0 ignored\n").0.few_failed(1),
            None
        );
        let crashed = format!("{failed}running 1 test\ntest c ... \n");
        assert_eq!(read(&crashed).0.few_failed(1), None, "an executable did not come to its end");
        assert_eq!(read(&format!("{failed}{failed}")).0.few_failed(1), None, "one name, two tests");
    }

    #[test]
    fn what_failed_tests_said_is_kept() {
        let text = "running 1 test\ntest a ... FAILED\n\nfailures:\n\n---- a stdout ----\nError: no\n\nCaused by:\n    x\n\n\n\
             failures:\n    a\n\ntest result: FAILED. 0 passed; 1 failed; 0 ignored\nafter\n";
        let (reader, _) = read(text);
        assert_eq!(reader.said["a"], ["Error: no", "Caused by:", "    x"]);
        let long = format!("---- b stdout ----\n{}", "x\n".repeat(1000));
        assert_eq!(read(&long).0.said["b"].len(), MOST_SAID);
    }

    #[test]
    fn a_second_try_counts_for_those_that_failed_where_all_of_them_ran() {
        let closing =
            |passed: u32, failed: u32| format!("test result: ok. {passed} passed; {failed} failed; 0 ignored\n");
        let first = format!("test a ... ok\ntest b ... FAILED\ntest c ... FAILED\n{}", closing(1, 2));
        let came_to = |again: &str| {
            let joined = retried("x", &read(&first).0, &read(again).0, RetryExtent::Failed);
            assert!(joined.second_tries.iter().all(|one| ["x::b", "x::c"].contains(&one.test.as_str())));
            (joined.tally.passed, joined.tally.failed, joined.second_tries.iter().filter(|one| one.passed).count())
        };
        assert_eq!(came_to(&format!("test b ... ok\ntest c ... ok\n{}", closing(2, 0))), (3, 0, 2));
        assert_eq!(came_to(&format!("test b ... ok\ntest c ... FAILED\n{}", closing(1, 1))), (2, 1, 1));
        assert_eq!(came_to(&closing(0, 0)), (1, 2, 0), "what is not found does not pass");
        let crashed = "running 2 tests\ntest b ... ok\n";
        assert_eq!(came_to(crashed), (1, 2, 0));
    }

    #[test]
    fn an_executable_that_died_passes_when_its_second_run_came_to_an_end() {
        let came_to = |first: &str, again: &str| {
            let joined = retried("x", &read(first).0, &read(again).0, RetryExtent::Whole);
            joined.second_tries.into_iter().map(|one| (one.test, one.passed)).collect::<Vec<_>>()
        };
        let one = |test: &str, passed| vec![(test.to_owned(), passed)];
        let died = "running 2 tests\ntest a ... ok\n";
        let died_later = "running 2 tests\ntest a ... FAILED\n";
        let good = "running 2 tests\ntest a ... ok\ntest b ... ok\ntest result: ok. 2 passed; 0 failed; 0 ignored\n";
        assert_eq!(came_to(died, good), one("x", true));
        assert_eq!(came_to(died, died), one("x", false));
        assert_eq!(came_to(died, ""), one("x", false));
        assert_eq!(came_to(died_later, good), one("x::a", true));
        assert_eq!(came_to(died_later, died), one("x::a", false), "it was not told of again");
    }

    #[test]
    fn tests_in_parallel_are_counted_by_what_they_say() {
        let (reader, _) =
            read("  | NOT RUN HERE x: y\ntest a ... ok\ntest result: ok. 1 passed; 0 failed; 0 ignored\n");
        assert_eq!(reader.tally(), Tally { passed: 0, failed: 0, skipped: 1 });
    }
}
