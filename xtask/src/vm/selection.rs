//! Which tests run in which machine.
//!
//! Every test of the machines has an answer that can differ by kernel. Most are quick, and run in each of them. Those that
//! are slow by design run at the ends of the matrix, unless all is wanted: on the oldest and the newest kernel of each
//! version of cgroups. What breaks in between without breaking at one of the ends is what `--all` is for.

use super::kernels::{Cgroup, KERNELS};

/// How much is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Selection {
    /// What every change is tried with.
    Usual,
    /// Every test in every machine.
    All,
}

/// A test of the machines that is slow by design, and why it is.
pub(crate) struct Slow {
    executable: &'static str,
    /// All of the executable's without.
    test: Option<&'static str>,
    why: &'static str,
}

const SLOW: [Slow; 0] = [];

impl Selection {
    /// What is left out in a machine.
    pub(crate) fn left_out(self, kernel: &str, cgroup: Cgroup) -> &'static [Slow] {
        if self == Self::All || is_at_an_end(kernel, cgroup) { &[] } else { &SLOW }
    }
}

impl Slow {
    /// `EXECUTABLE`, or `EXECUTABLE TEST`: how the guest is told.
    pub(crate) fn named(&self) -> String {
        match self.test {
            Some(test) => format!("{} {test}", self.executable),
            None => self.executable.to_owned(),
        }
    }
}

/// For people.
impl std::fmt::Display for Slow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {} (--all)", self.named().replace(' ', "::"), self.why)
    }
}

/// The oldest or the newest kernel with that version of cgroups. The matrix goes from old to new.
fn is_at_an_end(kernel: &str, cgroup: Cgroup) -> bool {
    let mut with = KERNELS.iter().filter(|kernel| kernel.cgroups.contains(&cgroup)).map(|kernel| kernel.name);
    let (first, last) = (with.next(), with.next_back());
    [first, last].contains(&Some(kernel))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_the_matrix_run_everything() {
        for (kernel, cgroup) in
            [("5.10-old", Cgroup::V1), ("6.1", Cgroup::V1), ("5.10", Cgroup::V2), ("backports", Cgroup::V2)]
        {
            assert!(is_at_an_end(kernel, cgroup), "{kernel}-{cgroup}");
            assert!(Selection::Usual.left_out(kernel, cgroup).is_empty());
        }
        for (kernel, cgroup) in [("5.10", Cgroup::V1), ("6.1", Cgroup::V2), ("6.12", Cgroup::V2), ("sid", Cgroup::V2)] {
            assert!(!is_at_an_end(kernel, cgroup), "{kernel}-{cgroup}");
            assert_eq!(Selection::Usual.left_out(kernel, cgroup).len(), SLOW.len());
            assert!(Selection::All.left_out(kernel, cgroup).is_empty());
        }
    }

    #[test]
    fn a_test_is_named_for_the_guest_and_for_people() {
        let mut slow = Slow { executable: "kernel_x", test: Some("a_test"), why: "many kills" };
        assert_eq!(
            (slow.named().as_str(), slow.to_string().as_str()),
            ("kernel_x a_test", "kernel_x::a_test, many kills (--all)")
        );
        slow.test = None;
        assert_eq!(slow.named(), "kernel_x");
    }
}
