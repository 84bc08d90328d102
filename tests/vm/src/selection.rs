//! Which tests run in which machine.
//!
//! Every test here can give different answers on different kernels. Those that check loading,
//! attaching, kills, readings and stacks run on each kernel. The rest run only at the ends of the
//! matrix, on the oldest and the newest kernel of each version of cgroups. `--all` runs everything
//! everywhere, for what breaks on a kernel in between and at neither end.

use super::kernels::{CgroupVersion, KERNELS};

/// How many tests are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    /// The tests for every change.
    Usual,
    /// Every test in every machine.
    All,
}

/// A test executable that does not run in every machine, and why.
#[derive(Debug)]
pub(crate) struct Rare {
    /// Name of the executable.
    pub(crate) executable: &'static str,
    runs_on: RunsOn,
    why: &'static str,
}

#[derive(Debug, PartialEq, Eq)]
enum RunsOn {
    /// Runs on the oldest and the newest kernel of each version of cgroups.
    Ends,
    /// Runs on the newest kernel.
    Newest,
}

const RARE: [Rare; 14] = [
    Rare { executable: "kernel_change", runs_on: RunsOn::Ends, why: "fork, exec and moves between cgroups" },
    Rare { executable: "kernel_degraded", runs_on: RunsOn::Newest, why: "an agent for each hook that is left out" },
    Rare { executable: "kernel_kills", runs_on: RunsOn::Ends, why: "many kills" },
    Rare { executable: "kernel_names", runs_on: RunsOn::Ends, why: "a kill for each kind of name" },
    Rare { executable: "kernel_pressure", runs_on: RunsOn::Ends, why: "shortages that last" },
    Rare { executable: "kernel_privileges", runs_on: RunsOn::Ends, why: "what each thread of the agent may do" },
    Rare { executable: "kernel_retention", runs_on: RunsOn::Ends, why: "many kills by one user, and in one cgroup" },
    Rare { executable: "kernel_scope", runs_on: RunsOn::Ends, why: "every shape of a cgroup tree" },
    Rare { executable: "kernel_secret", runs_on: RunsOn::Ends, why: "searches all that the agent has" },
    Rare { executable: "kernel_sigkill", runs_on: RunsOn::Ends, why: "every sender of a SIGKILL" },
    Rare {
        executable: "kernel_small",
        runs_on: RunsOn::Ends,
        why: "a storm of kills, with an agent in a small cgroup",
    },
    Rare { executable: "kernel_storm", runs_on: RunsOn::Ends, why: "many kills at once" },
    Rare { executable: "kernel_symbolizer", runs_on: RunsOn::Ends, why: "what a confined process may do" },
    Rare { executable: "kernel_unwatched", runs_on: RunsOn::Ends, why: "six starts of an agent" },
];

impl Selection {
    /// Executables that do not run in every machine.
    pub(crate) fn rare(self) -> &'static [Rare] {
        if self == Self::Usual { &RARE } else { &[] }
    }

    /// Executables that are left out in this machine.
    pub(crate) fn left_out(self, kernel: &str, cgroup: CgroupVersion) -> Vec<&'static Rare> {
        let has_a_place = |rare: &&Rare| match rare.runs_on {
            RunsOn::Ends => is_at_an_end(kernel, cgroup),
            RunsOn::Newest => KERNELS.last().is_some_and(|newest| newest.name == kernel),
        };
        self.rare().iter().filter(|rare| !has_a_place(rare)).collect()
    }
}

/// `EXECUTABLE: WHY`.
impl std::fmt::Display for Rare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.executable, self.why)
    }
}

/// Whether the kernel is the oldest or the newest with that version of cgroups. The matrix is
/// sorted from old to new.
fn is_at_an_end(kernel: &str, cgroup: CgroupVersion) -> bool {
    let mut with = KERNELS.iter().filter(|kernel| kernel.cgroups.contains(&cgroup)).map(|kernel| kernel.name);
    let (first, last) = (with.next(), with.next_back());
    [first, last].contains(&Some(kernel))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(selection: Selection, kernel: &str, cgroup: CgroupVersion) -> Vec<&'static str> {
        selection.left_out(kernel, cgroup).iter().map(|rare| rare.executable).collect()
    }

    #[test]
    fn the_ends_of_the_matrix_run_nearly_everything_and_the_newest_kernel_all() {
        for (kernel, cgroup) in
            [("5.10-old", CgroupVersion::V1), ("6.1", CgroupVersion::V1), ("5.10", CgroupVersion::V2)]
        {
            let left_out = names(Selection::Usual, kernel, cgroup);
            assert_eq!(left_out, ["kernel_degraded"], "{kernel}-{cgroup}");
        }
        assert!(names(Selection::Usual, "backports", CgroupVersion::V2).is_empty());
        for (kernel, cgroup) in [
            ("5.10", CgroupVersion::V1),
            ("6.1", CgroupVersion::V2),
            ("6.12", CgroupVersion::V2),
            ("sid", CgroupVersion::V2),
        ] {
            assert_eq!(names(Selection::Usual, kernel, cgroup).len(), RARE.len(), "{kernel}-{cgroup}");
            assert!(names(Selection::All, kernel, cgroup).is_empty());
        }
    }

    #[test]
    fn what_is_left_out_is_there_and_runs_in_machines() {
        let tests = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests");
        for rare in &RARE {
            assert!(tests.join(format!("{}.rs", rare.executable)).is_file(), "{rare}");
            assert!(super::super::payload::LEFT_OUT.iter().all(|(name, _)| *name != rare.executable), "{rare}");
        }
    }
}
