//! Counts by kernel that are committed to the repository, and which of them grew. Pure.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

/// A kind of count.
pub trait Count: Sized + Clone {
    /// Path of the snapshot's file in the repository.
    const FILE: &'static str;
    /// Comment lines at the top of the file.
    const HEADER: &'static str;
    /// Command that writes the file.
    const BLESS: &'static str;
    /// Number of words of a name in a line.
    const NAME_WORDS: usize;

    /// Parses the words after the name.
    fn read(words: &[&str]) -> Option<Self>;

    /// The same words, for the file.
    fn write(&self) -> String;

    /// Why it is a failure that this count is now `new`, or `None` if it is not. `same_version`:
    /// both are of the same package version, else of the same kernel series.
    fn grown(&self, name: &str, new: &Self, same_version: bool) -> Option<String>;
}

/// Counts of one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeasuredCounts<C> {
    /// Version of the Debian package of its kernel.
    pub version: String,
    /// Counts by name.
    pub counts: BTreeMap<String, C>,
}

/// Counts by kernel of the matrix and version of cgroups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CountSnapshot<C>(BTreeMap<(String, String), MeasuredCounts<C>>);

/// Result of a comparison.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct CountComparison {
    /// Counts that grew too much or are missing, one sentence each.
    pub worse: Vec<String>,
    /// A remark, for example that another version was compared.
    pub note: Option<String>,
}

impl<C> Default for CountSnapshot<C> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<C: Count> CountSnapshot<C> {
    /// Parses the file's text.
    pub fn read(text: &str) -> Result<Self> {
        let mut snapshot = Self::default();
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            snapshot.entry(line).with_context(|| format!("bad line in {}: {line}", C::FILE))?;
        }
        Ok(snapshot)
    }

    fn entry(&mut self, line: &str) -> Option<()> {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let (key, rest) = words.split_at_checked(3)?;
        let [kernel, cgroup, version] = key else { return None };
        let (name, count) = rest.split_at_checked(C::NAME_WORDS)?;
        let count = C::read(count)?;
        let key = ((*kernel).to_owned(), (*cgroup).to_owned());
        let fresh = || MeasuredCounts { version: (*version).to_owned(), counts: BTreeMap::new() };
        self.0.entry(key).or_insert_with(fresh).counts.insert(name.join(" "), count);
        Some(())
    }

    /// Text of the file.
    pub fn text(&self) -> String {
        let mut text = C::HEADER.to_owned();
        for ((kernel, cgroup), MeasuredCounts { version, counts }) in &self.0 {
            text.push('\n');
            for (name, count) in counts {
                text.push_str(&format!("{kernel} {cgroup} {version} {name} {}\n", count.write()));
            }
        }
        text
    }

    /// Replaces the counts of a machine.
    pub fn bless(&mut self, kernel: &str, cgroup: &str, measured: MeasuredCounts<C>) {
        self.0.insert((kernel.to_owned(), cgroup.to_owned()), measured);
    }

    /// Compares new counts with the snapshot. A count that is missing is a failure if `expected`
    /// holds for its name.
    pub fn compare(
        &self,
        kernel: &str,
        cgroup: &str,
        measured: &MeasuredCounts<C>,
        expected: impl Fn(&str) -> bool,
    ) -> CountComparison {
        let (version, counts) = (&measured.version, &measured.counts);
        let mut compared = CountComparison::default();
        let old = self.0.get(&(kernel.to_owned(), cgroup.to_owned()));
        let Some(old) = old.filter(|old| series(&old.version) == series(version)) else {
            compared.note = Some(format!("{} has nothing of the series of {version} to compare with", C::FILE));
            return compared;
        };
        if old.version != *version {
            compared.note = Some(format!("{version} is compared with {} in {}", old.version, C::FILE));
        }
        for (name, count) in &old.counts {
            let what = match counts.get(name) {
                None if !expected(name) => continue,
                None => format!("{name} was there before, and is not any more"),
                Some(new) => match count.grown(name, new, old.version == *version) {
                    Some(what) => what,
                    None => continue,
                },
            };
            compared.worse.push(format!("{what}; if it is meant to be so, run `{}`", C::BLESS));
        }
        compared
    }
}

/// The series of a version: `5.10` of `5.10.262-1`.
fn series(version: &str) -> &str {
    let end = version.match_indices(|c: char| !c.is_ascii_digit()).nth(1).map_or(version.len(), |(at, _)| at);
    version.get(..end).unwrap_or(version)
}

#[cfg(test)]
mod tests {
    use super::super::verifier::VerifierCost;
    use super::*;

    fn measured(version: &str, program: &str, instructions: u64) -> MeasuredCounts<VerifierCost> {
        let counts = BTreeMap::from([(program.to_owned(), VerifierCost { instructions, bytes: Some(10) })]);
        MeasuredCounts { version: version.to_owned(), counts }
    }

    #[test]
    fn it_is_written_as_it_is_read() {
        let mut snapshot = CountSnapshot::default();
        snapshot.bless("6.1", "v2", measured("6.1.192-2", "rss_stat", 100));
        snapshot.bless("5.10", "v1", measured("5.10.262-1", "percpu_init", 7));
        let text = snapshot.text();
        assert!(
            text.ends_with("\n\n5.10 v1 5.10.262-1 percpu_init 7 10\n\n6.1 v2 6.1.192-2 rss_stat 100 10\n"),
            "{text}"
        );
        assert_eq!(CountSnapshot::read(&text).unwrap(), snapshot);
        assert!(CountSnapshot::<VerifierCost>::read("6.1 v2 rss_stat 100\n").is_err());
        assert!(CountSnapshot::<VerifierCost>::read("6.1\n").is_err());
    }

    #[test]
    fn two_percent_more_are_borne_and_no_more() {
        let mut snapshot = CountSnapshot::default();
        snapshot.bless("6.1", "v2", measured("6.1.192-2", "rss_stat", 1000));
        let worse = |now: u64| snapshot.compare("6.1", "v2", &measured("6.1.192-2", "rss_stat", now), |_| true).worse;
        assert!(worse(1020).is_empty() && worse(900).is_empty());
        let said = worse(1021);
        let [said] = said.as_slice() else { panic!("{said:?}") };
        for part in ["rss_stat", "1021", "1000", "--bless"] {
            assert!(said.contains(part), "{said}");
        }
        assert!(snapshot.compare("6.1", "v2", &measured("6.1.192-2", "other", 1), |_| false).worse.is_empty());
        let gone = snapshot.compare("6.1", "v2", &measured("6.1.192-2", "other", 1), |_| true).worse;
        assert!(gone.len() == 1 && gone[0].contains("not any more"), "{gone:?}");
    }

    #[test]
    fn another_version_of_the_series_is_compared_and_said() {
        let mut snapshot = CountSnapshot::default();
        snapshot.bless("sid", "v2", measured("7.2.13-1", "rss_stat", 1000));
        assert!(snapshot.compare("sid", "v2", &measured("7.2.20-1", "rss_stat", 1100), |_| true).worse.is_empty());
        let compared = snapshot.compare("sid", "v2", &measured("7.2.20-1", "rss_stat", 1101), |_| true);
        assert_eq!(compared.worse.len(), 1);
        assert!(compared.note.is_some_and(|note| note.contains("7.2.20-1") && note.contains("7.2.13-1")));
        let compared = snapshot.compare("sid", "v2", &measured("7.20.1-1", "rss_stat", 2000), |_| true);
        assert!(compared.worse.is_empty() && compared.note.is_some());
    }
}
