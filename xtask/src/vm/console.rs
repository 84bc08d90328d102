//! What a machine's console says: the guest's own lines, and between them what its test executables print. Pure.

use crate::libtest::{Reader, Tally};

/// How the guest's own lines begin: see tests/src/bin/guest.
const OWN: &str = "@memtrace ";

/// Lines of the console kept for an error.
const TAIL: usize = 25;

/// Reads a console line by line.
#[derive(Debug, Default)]
pub(crate) struct Console {
    reader: Reader,
    executable: Option<String>,
    /// As it was when the executable at hand began, for when it runs once more.
    before: (Reader, Vec<String>),
    second_tries: Vec<String>,
    ran: u64,
    done: bool,
    troubles: Vec<String>,
    failed: Vec<String>,
    tail: Vec<String>,
    emulator_at_fault: bool,
}

/// What a whole console came to.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Said {
    /// Tests, and each trouble as one failure more.
    pub(crate) tally: Tally,
    /// `EXECUTABLE::TEST` of tests that failed.
    pub(crate) failed: Vec<String>,
    /// What else went wrong, one sentence each.
    pub(crate) troubles: Vec<String>,
    /// It ended before the first test, or by a fault of the emulator: neither is what is tested.
    pub(crate) not_a_test: bool,
    /// What could not run here, and why.
    pub(crate) not_run: Vec<String>,
    /// Executables that ran once more, and what had failed in them; only the second try counts.
    pub(crate) second_tries: Vec<String>,
    /// The end of the console; empty when nothing went wrong with the machine itself.
    pub(crate) tail: Vec<String>,
}

impl Console {
    /// Takes a line; a line of progress may come of it.
    pub(crate) fn line(&mut self, line: &str) -> Option<String> {
        let line = line.trim_end_matches(['\r', '\n']);
        if !line.is_empty() {
            self.tail.push(line.to_owned());
            if self.tail.len() > TAIL {
                self.tail.remove(0);
            }
        }
        // A kernel patches its own code by way of int3 (arch/x86/kernel/alternative.c); an emulator of several processors
        // now and then runs one that is there no more.
        self.emulator_at_fault |= line.contains("Oops: int3");
        if let Some((_, own)) = line.split_once(OWN) {
            return self.own(own);
        }
        let ended = self.reader.line(line)?;
        let executable = self.executable.as_deref().unwrap_or("?");
        if ended.word == "FAILED" {
            self.failed.push(format!("{executable}::{}", ended.test));
        }
        Some(format!("{executable}::{} {}", ended.test, ended.word))
    }

    fn own(&mut self, line: &str) -> Option<String> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "begin" => {
                self.executable = Some(rest.to_owned());
                self.before = (self.reader.clone(), self.failed.clone());
            }
            "again" => {
                let failed = self.failed.split_off(self.before.1.len().min(self.failed.len()));
                let torn: Vec<&str> =
                    self.reader.failed.difference(&self.before.0.failed).map(String::as_str).collect();
                let what = if failed.is_empty() { torn.join(", ") } else { failed.join(", ") };
                self.second_tries.push(format!("{rest}, in which failed: {what}"));
                (self.reader, self.failed) = self.before.clone();
                return Some(format!("{rest} once more"));
            }
            "end" => {
                self.executable = None;
                self.ran += 1;
                let (executable, how) = rest.split_once(": ").unwrap_or((rest, ""));
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

    /// The console has ended; `cut_off` says why before its time.
    pub(crate) fn end(mut self, cut_off: Option<String>) -> Said {
        let mut tail = Vec::new();
        if cut_off.is_some() || (!self.done && self.troubles.is_empty()) {
            let during = match (&self.executable, self.ran) {
                (Some(executable), _) => format!("during {executable}"),
                (None, 0) => "before the first test".to_owned(),
                (None, _) => "after the tests".to_owned(),
            };
            let how = cut_off.unwrap_or_else(|| "the machine ended".to_owned());
            self.troubles.push(format!("{how} {during}"));
            tail = self.tail;
        }
        let mut failed = self.failed;
        // a failure whose own line was torn by what its test printed
        for test in &self.reader.failed {
            if !failed.iter().any(|have| have.ends_with(&format!("::{test}"))) {
                failed.push(test.clone());
            }
        }
        let mut tally = self.reader.tally();
        tally.failed += self.troubles.len() as u64;
        let never_began = self.ran == 0 && self.executable.is_none();
        let not_a_test = !tail.is_empty() && (never_began || self.emulator_at_fault);
        let (troubles, not_run, second_tries) = (self.troubles, self.reader.not_run, self.second_tries);
        Said { tally, failed, troubles, not_run, second_tries, tail, not_a_test }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str, cut_off: Option<&str>) -> (Said, Vec<String>) {
        let mut console = Console::default();
        let progress = text.lines().filter_map(|line| console.line(line)).collect();
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
            "@memtrace begin vm_x\ntest a ... FAILED\ntest b ...   | torn\nchatterFAILED\n---- a stdout ----\n\
             ---- b stdout ----\ntest result: FAILED. 0 passed; 2 failed; 0 ignored\n\
             @memtrace end vm_x after 1 s: failed\n@memtrace done\n",
            None,
        );
        assert_eq!(said.failed, ["vm_x::a", "b"]);
        assert_eq!(said.tally.failed, 2);
        assert!(said.troubles.is_empty());
    }

    #[test]
    fn of_two_tries_the_second_counts_and_the_first_is_told() {
        let first = "@memtrace begin vm_x\ntest a ... FAILED\n---- a stdout ----\n\
             test result: FAILED. 1 passed; 1 failed; 0 ignored\n@memtrace again vm_x\n";
        let good =
            "test a ... ok\ntest result: ok. 2 passed; 0 failed; 0 ignored\n@memtrace end vm_x after 1 s: passed\n";
        let bad = "test a ... FAILED\ntest result: FAILED. 1 passed; 1 failed; 0 ignored\n@memtrace end vm_x after 1 s: failed\n";
        let (told, _) = said(&format!("{GOOD}{first}{good}@memtrace done\n"), None);
        assert_eq!(told.tally, Tally { passed: 3, failed: 0, skipped: 1 });
        assert_eq!(told.second_tries, ["vm_x, in which failed: vm_x::a"]);
        assert!(told.failed.is_empty() && told.troubles.is_empty(), "{told:?}");
        let (told, _) = said(&format!("{GOOD}{first}{bad}@memtrace done\n"), None);
        assert_eq!((told.tally.failed, told.failed), (1, vec!["vm_x::a".to_owned()]));
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
        let (said, _) = self::said(&format!("{GOOD}@memtrace begin b\n"), Some("cut off after 900 s"));
        assert_eq!(said.troubles, ["cut off after 900 s during b"]);
        assert!(!said.not_a_test);
        let oops = "[ 231.5] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI";
        let (said, _) = self::said(&format!("{GOOD}@memtrace begin b\n{oops}\n"), None);
        assert!(said.not_a_test, "{said:?}");
    }
}
