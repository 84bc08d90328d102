//! Reads a machine's serial console: lines of the guest's protocol, mixed with the output of the
//! test executables. Pure.

use super::watch::Sign;
use memtrace_harness::libtest::{LibtestReader, RetriedRun, RetryExtent, SecondTry, Tally, retried};

/// Prefix of the guest's protocol lines, written by tests/vm/guest.
const OWN: &str = "@memtrace ";

/// Heartbeat of the guest. Without it, silence would mean nothing.
const ALIVE: &str = "alive";

/// Last lines of the console that are kept for an error report.
const TAIL: usize = 25;

/// Reads a console line by line.
#[derive(Debug, Default)]
pub(crate) struct Console {
    /// The executable that is running.
    running: Option<RunningExecutable>,
    /// Number of executables that have ended.
    ran: u64,
    tally: Tally,
    not_run: Vec<String>,
    done: bool,
    troubles: Vec<String>,
    failed: Vec<String>,
    second_tries: Vec<SecondTry>,
    tail: Vec<String>,
    emulator_at_fault: bool,
}

/// A test executable that is running.
#[derive(Debug, Default)]
struct RunningExecutable {
    executable: String,
    reader: LibtestReader,
    /// Its first run and what of it is being repeated, if it is the second run.
    first: Option<(LibtestReader, RetryExtent)>,
}

/// Meaning of one line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct HeardLine {
    pub(crate) sign: Sign,
    /// A line of progress to print.
    pub(crate) shown: Option<String>,
}

/// Result of a whole console.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct ConsoleSummary {
    /// Results of the tests; each entry of `troubles` counts as one more failure.
    pub(crate) tally: Tally,
    /// `EXECUTABLE::TEST: OUTPUT` of each failed test.
    pub(crate) failed: Vec<String>,
    /// Other failures, one sentence each.
    pub(crate) troubles: Vec<String>,
    /// The machine ended before the first test or by a fault of the emulator, so the result says
    /// nothing about the tests.
    pub(crate) not_a_test: bool,
    /// What could not run here, and why.
    pub(crate) not_run: Vec<String>,
    /// Failed tests that were run once more. Only the second result counts.
    pub(crate) second_tries: Vec<SecondTry>,
    /// Last lines of the console, if the machine itself failed; else empty.
    pub(crate) tail: Vec<String>,
}

impl Console {
    /// Reads the next line. Returns what it means, or `None` if nothing.
    pub(crate) fn line(&mut self, line: &str) -> Option<HeardLine> {
        let line = line.trim_end_matches(['\r', '\n']);
        // The kernel patches its own code by way of int3 (arch/x86/kernel/alternative.c). QEMU with
        // several CPUs sometimes executes an int3 that is gone already, which the kernel reports as
        // an oops.
        self.emulator_at_fault |= line.contains("Oops: int3");
        let own = line.split_once(OWN).map(|(_, own)| own);
        if !line.is_empty() && own != Some(ALIVE) {
            self.tail.push(line.to_owned());
            if self.tail.len() > TAIL {
                self.tail.remove(0);
            }
        }
        match own {
            Some(ALIVE) => Some(HeardLine { sign: Sign::Alive, shown: None }),
            Some(own) => Some(HeardLine { sign: Sign::Progress, shown: self.own(own) }),
            None => {
                let running = self.running.as_mut()?;
                let ended = running.reader.line(line)?;
                let shown = Some(format!("{}::{} {}", running.executable, ended.test, ended.word));
                Some(HeardLine { sign: Sign::Progress, shown })
            }
        }
    }

    fn own(&mut self, line: &str) -> Option<String> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "begin" => {
                self.running = Some(RunningExecutable { executable: rest.to_owned(), ..RunningExecutable::default() })
            }
            "again" => {
                let running = self.running.as_mut()?;
                let (executable, failed) = rest.split_once(' ').unwrap_or((rest, ""));
                let first = std::mem::take(&mut running.reader);
                running.first = Some((first, if failed.is_empty() { RetryExtent::Whole } else { RetryExtent::Failed }));
                return Some(format!("{executable} once more {failed}").trim_end().to_owned());
            }
            "end" => {
                let (executable, how) = rest.split_once(": ").unwrap_or((rest, ""));
                let running = self.running.take().unwrap_or_default();
                self.ended(running);
                if !["passed", "failed"].contains(&how) {
                    self.troubles.push(format!("{executable}: {how}"));
                    return Some(format!("{executable}: {how}"));
                }
            }
            "trouble" => {
                self.troubles.push(rest.to_owned());
                return Some(rest.to_owned());
            }
            "done" => self.done = true,
            _ => {}
        }
        None
    }

    /// Adds the result of an executable.
    fn ended(&mut self, running: RunningExecutable) {
        self.ran += 1;
        let RunningExecutable { executable, reader, first } = running;
        let mut tally = reader.tally();
        if let Some((first, extent)) = first {
            let RetriedRun { tally: joined, second_tries } = retried(&executable, &first, &reader, extent);
            tally = joined;
            self.second_tries.extend(second_tries);
            if extent == RetryExtent::Failed {
                self.not_run.extend(first.not_run);
            }
        }
        self.tally = self.tally.plus(tally);
        self.not_run.extend(reader.not_run);
        self.failed.extend(reader.failed.iter().map(|test| {
            let said = reader.said.get(test).map(|lines| lines.join("\n      ")).unwrap_or_default();
            format!("{executable}::{test}: {said}")
        }));
    }

    /// Finishes at the end of the console. `cut_off` is the reason if the machine did not end by
    /// itself.
    pub(crate) fn end(mut self, cut_off: Option<String>) -> ConsoleSummary {
        let mut tail = Vec::new();
        let never_began = self.ran == 0 && self.running.is_none();
        if cut_off.is_some() || (!self.done && self.troubles.is_empty()) {
            let during = match (&self.running, self.ran) {
                (Some(running), _) => format!("during {}", running.executable),
                (None, 0) => "before the first test".to_owned(),
                (None, _) => "after the tests".to_owned(),
            };
            let how = cut_off.unwrap_or_else(|| "the machine ended".to_owned());
            self.troubles.push(format!("{how} {during}"));
            tail = std::mem::take(&mut self.tail);
        }
        if let Some(running) = self.running.take() {
            self.ended(running);
        }
        let mut tally = self.tally;
        tally.failed += self.troubles.len() as u64;
        let not_a_test = !tail.is_empty() && (never_began || self.emulator_at_fault);
        let (failed, troubles, not_run, second_tries) = (self.failed, self.troubles, self.not_run, self.second_tries);
        ConsoleSummary { tally, failed, troubles, not_run, second_tries, tail, not_a_test }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str, cut_off: Option<&str>) -> (ConsoleSummary, Vec<String>) {
        let mut console = Console::default();
        let progress = text.lines().filter_map(|line| console.line(line)?.shown).collect();
        (console.end(cut_off.map(str::to_owned)), progress)
    }

    const GOOD: &str = "\r\n@memtrace begin kernel_tools\r\n\r\nrunning 2 tests\r\ntest a ...   | 3 ns\r\nok\r\n\
        test b ...   | NOT RUN HERE swap: no disk\r\nok\r\n\r\ntest result: ok. 2 passed; 0 failed; 0 ignored\r\n\
        @memtrace end kernel_tools after 3 s: passed\r\n";

    #[test]
    fn a_good_run_is_told_test_by_test() {
        let (said, progress) = said(&format!("{GOOD}\n@memtrace done\n"), None);
        assert_eq!(progress, ["kernel_tools::a ok", "kernel_tools::b not run"]);
        assert_eq!(said.tally, Tally { passed: 1, failed: 0, skipped: 1 });
        assert_eq!(said.not_run, ["swap: no disk"]);
        assert!(said.failed.is_empty() && said.troubles.is_empty() && said.tail.is_empty());
    }

    #[test]
    fn failures_are_named_with_their_executable() {
        let (said, _) = said(
            "@memtrace begin vm_x\ntest a ... FAILED\ntest b ...   | torn\nchatterFAILED\n---- a stdout ----\nno\n\
             ---- b stdout ----\ntest result: FAILED. 0 passed; 2 failed; 0 ignored\n\
             @memtrace end vm_x after 1 s: failed\n@memtrace done\n",
            None,
        );
        assert_eq!(said.failed, ["vm_x::a: no", "vm_x::b: "]);
        assert_eq!(said.tally.failed, 2);
        assert!(said.troubles.is_empty());
    }

    #[test]
    fn of_two_tries_the_second_counts_and_the_first_is_told() {
        let first = "@memtrace begin vm_x\ntest a ... FAILED\n---- a stdout ----\nError: late\n\
             test result: FAILED. 1 passed; 1 failed; 0 ignored\n@memtrace again vm_x a\n";
        let good =
            "test a ... ok\ntest result: ok. 1 passed; 0 failed; 0 ignored\n@memtrace end vm_x after 1 s: passed\n";
        let bad = "test a ... FAILED\n---- a stdout ----\nError: no\ntest result: FAILED. 0 passed; 1 failed; 0 ignored\n\
            @memtrace end vm_x after 1 s: failed\n";
        let (told, progress) = said(&format!("{GOOD}{first}{good}@memtrace done\n"), None);
        assert_eq!(told.tally, Tally { passed: 3, failed: 0, skipped: 1 });
        let second = |passed| SecondTry { test: "vm_x::a".to_owned(), said: vec!["Error: late".to_owned()], passed };
        assert_eq!(told.second_tries, [second(true)]);
        assert!(told.failed.is_empty() && told.troubles.is_empty(), "{told:?}");
        assert!(progress.contains(&"vm_x once more a".to_owned()), "{progress:?}");
        let (told, _) = said(&format!("{GOOD}{first}{bad}@memtrace done\n"), None);
        assert_eq!((told.tally.failed, told.failed), (1, vec!["vm_x::a: Error: no".to_owned()]));
        assert_eq!(told.second_tries, [second(false)]);
    }

    #[test]
    fn an_executable_that_died_runs_once_more_as_a_whole() {
        let died = "@memtrace begin vm_x\nrunning 2 tests\ntest a ... ok\ntest b ... \n@memtrace again vm_x\n";
        let good = "running 2 tests\ntest a ... ok\ntest b ... ok\ntest result: ok. 2 passed; 0 failed; 0 ignored\n\
            @memtrace end vm_x after 1 s: passed\n";
        let (told, _) = said(&format!("{GOOD}{died}{good}@memtrace done\n"), None);
        assert_eq!(told.tally, Tally { passed: 3, failed: 0, skipped: 1 });
        assert_eq!(told.second_tries.iter().map(|t| (t.test.as_str(), t.passed)).collect::<Vec<_>>(), [("vm_x", true)]);
    }

    #[test]
    fn that_the_guest_is_there_is_no_progress() {
        let mut console = Console::default();
        assert_eq!(console.line("@memtrace alive\r").map(|heard| heard.sign), Some(Sign::Alive));
        assert_eq!(console.line("@memtrace begin a").map(|heard| heard.sign), Some(Sign::Progress));
        assert_eq!(console.line("  | chatter"), None);
        assert_eq!(console.line("test a ... ok").map(|heard| heard.sign), Some(Sign::Progress));
        assert!(!console.end(Some("given up".to_owned())).tail.iter().any(|line| line.contains("alive")));
    }

    #[test]
    fn an_executable_that_dies_is_a_failure() {
        let (said, _) = said(
            &format!(
                "{GOOD}@memtrace begin vm_x\ntest a ... @memtrace end vm_x after 9 s: died of signal 9\n@memtrace done\n"
            ),
            None,
        );
        assert_eq!(said.troubles, ["vm_x after 9 s: died of signal 9"]);
        assert_eq!(said.tally, Tally { passed: 1, failed: 1, skipped: 1 });
    }

    #[test]
    fn a_machine_that_does_not_finish_is_a_failure_with_its_last_words() {
        let (said, _) = said("Kernel panic\n", None);
        assert_eq!(said.troubles, ["the machine ended before the first test"]);
        assert_eq!(said.tail, ["Kernel panic"]);
        assert!(said.not_a_test);
        let (said, _) = self::said(&format!("{GOOD}@memtrace begin b\n"), Some("given up after 900 s"));
        assert_eq!(said.troubles, ["given up after 900 s during b"]);
        assert!(!said.not_a_test);
        let oops = "[ 231.5] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI";
        let (said, _) = self::said(&format!("{GOOD}@memtrace begin b\n{oops}\n"), None);
        assert!(said.not_a_test, "{said:?}");
    }
}
