//! Everything that can be missing from memtrace's data, as one enum. A loss is counted where it
//! happens, and every report shows its label and its sentence.
//!
//! A label has the form `source/what` and is the same in the incident file, in `/metrics`, in the
//! agent's log and on the terminal. The kernel side counts its losses per ring
//! (`samples/ring_full`) or per hook (`map/not_run`); their labels here are the part after the
//! slash.

/// A reason why something is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Loss {
    /// Kernel side, per ring: a record found no room.
    RingFull,
    /// Kernel side, per ring: the table of address spaces was full.
    TableFull,
    /// Kernel side, per ring: a victim was named by a pid that could not be found.
    NoOwner,
    /// Kernel side, per ring: an owner's cgroup or a victim's address space could not be read.
    Unreadable,
    /// Kernel side, per ring: reclaim records above the rate limit.
    RateLimited,
    /// Kernel side, per ring: mapping calls of 32-bit programs.
    Compat,
    /// Kernel side, per ring: a thread's mapping that another thread's stack stands for.
    Merged,
    /// Kernel side, per hook: the kernel did not run the program.
    NotRun,
    /// The loss counters of the kernel side could not be read.
    CountersUnreadable,
    /// A record had the wrong size.
    BadRecords,
    /// A record had a kind that this build does not know.
    UnknownRecordKinds,
    /// The cap of processes was reached.
    ProcessesEvicted,
    /// The cap of cgroups was reached.
    CgroupsEvicted,
    /// The cap of cgroups was reached, and a cgroup found no room.
    CgroupsOverCap,
    /// The cap of readings over all cgroups was reached.
    CurvesDropped,
    /// The cap of spike and near-miss detectors was reached.
    DetectorsRefused,
    /// The cap of allocation samples was reached.
    GrowthDropped,
    /// The cap of stuck cgroups was reached.
    StuckNotFollowed,
    /// The cap of SIGKILLs that wait for their mark was reached.
    KillsNotPaired,
    /// The rate limit of the SIGKILL ledger was reached.
    SigkillsNotReported,
    /// The cap of labels was reached.
    Other,
    /// The incident was closed before its window was over.
    WindowCutShort,
    /// The cap of victims in one incident was reached.
    VictimsNotListed,
    /// The cap of the task table was reached.
    TasksNotListed,
    /// The cap of mapping notes was reached.
    MappingsNotListed,
    /// Older readings of the curve were left out.
    TimelineThinned,
    /// The kernel overwrote lines of its log before they were read.
    KernelLogLinesLost,
    /// The kernel log has no line about a kill that the hooks saw.
    KernelLogSilent,
    /// The kernel log could not be read.
    KernelLogNotRead,
    /// A stack was left out to stay within the stack budget.
    StacksOverBudget,
    /// A stack came without the path it refers to, or its record was skipped.
    StacksWithoutFrames,
    /// A stack record had the wrong size.
    StacksBadRecords,
    /// The cap of processes with cached mappings was reached.
    StackProcessesForgotten,
    /// The cap of mappings of one process was reached.
    StackMappingsLeftOut,
    /// The cap of modules was reached.
    ModulesForgotten,
    /// The cap of open module files was reached.
    ModulesClosedEarly,
    /// The cap of unwind information of one module was reached.
    UnwindInformationTooLarge,
    /// A process' files were left alone, because reading them did not end before.
    StackFilesRefused,
    /// A process' files were not read, to stay within the stack budget.
    StackFilesOverBudget,
    /// The process that unwinds stacks hung or ended.
    StackWorkerReplaced,
    /// The journal could not be written.
    JournalNotWritten,
    /// The cap of cgroups whose `memory.oom_control` is watched was reached.
    CgroupNotWatched,
}

/// A loss, its label, and a sentence for people.
type Row = (Loss, &'static str, &'static str);

/// Every loss. The first eight labels are the part after `RING/` or `HOOK/`.
const ROWS: [Row; 42] = [
    (Loss::RingFull, "ring_full", "Records found no room in their ring."),
    (
        Loss::TableFull,
        "table_full",
        "The kernel side's table of address spaces was full: new processes were not followed.",
    ),
    (Loss::NoOwner, "no_owner", "A victim was named by a pid alone and could not be found."),
    (Loss::Unreadable, "unreadable", "The cgroup of an owner or the address space of a victim could not be read."),
    (Loss::RateLimited, "rate_limited", "Reclaim records were left out to bound their rate."),
    (Loss::Compat, "compat", "Mapping calls of 32-bit programs are not read."),
    (
        Loss::Merged,
        "merged",
        "Two threads mapped memory at once: the stack of one stands for both, the other mapping has none.",
    ),
    (Loss::NotRun, "not_run", "The kernel did not run the hook: a task was preempted inside it on that CPU."),
    (
        Loss::CountersUnreadable,
        "kernel/counters_unreadable",
        "The kernel side's loss counters could not be read: what was lost is not known.",
    ),
    (Loss::BadRecords, "engine/bad_records", "Records had the wrong size."),
    (
        Loss::UnknownRecordKinds,
        "engine/unknown_record_kinds",
        "Records were of a kind that this version does not know.",
    ),
    (
        Loss::ProcessesEvicted,
        "engine/processes_evicted",
        "More processes than are followed: those silent longest were dropped.",
    ),
    (
        Loss::CgroupsEvicted,
        "engine/cgroups_evicted",
        "More cgroups than are followed: those silent longest were dropped.",
    ),
    (
        Loss::CgroupsOverCap,
        "cgroups/over_cap",
        "More cgroups than are followed: these readings of further ones are in no curve and no sum.",
    ),
    (
        Loss::CurvesDropped,
        "engine/curves_dropped",
        "The memory for curves was used up: those of the cgroups silent longest were dropped.",
    ),
    (
        Loss::DetectorsRefused,
        "engine/detectors_refused",
        "More cgroups with a limit than are watched for spikes and near misses.",
    ),
    (Loss::GrowthDropped, "engine/growth_dropped", "More allocation samples than are kept."),
    (
        Loss::StuckNotFollowed,
        "engine/stuck_cgroups_not_followed",
        "More cgroups were stuck at their limit than are followed.",
    ),
    (
        Loss::KillsNotPaired,
        "engine/kills_not_paired",
        "The kernel sent SIGKILLs faster than they are matched with OOM kills: a victim may be missing.",
    ),
    (Loss::SigkillsNotReported, "engine/sigkills_not_reported", "SIGKILLs came faster than their ledger takes them."),
    (Loss::Other, "engine/other_losses", "Losses under more names than are kept."),
    (Loss::WindowCutShort, "incident/window_cut_short", "The incident was closed before its window was over."),
    (Loss::VictimsNotListed, "incident/victims_not_listed", "More victims than an incident lists."),
    (Loss::TasksNotListed, "incident/tasks_not_listed", "More processes than the task table lists."),
    (Loss::MappingsNotListed, "incident/mappings_not_listed", "More mappings than an incident lists."),
    (
        Loss::TimelineThinned,
        "timeline/thinned",
        "Readings were left out of the curve, which keeps less of what is older.",
    ),
    (Loss::KernelLogLinesLost, "kernel_log/lines_lost", "The kernel overwrote lines of its log before they were read."),
    (Loss::KernelLogSilent, "kernel_log/no_line", "The kernel log has no line for a kill that the hooks saw."),
    (
        Loss::KernelLogNotRead,
        "kernel_log/not_read",
        "The kernel log could not be read: what it has about a kill is not known.",
    ),
    (
        Loss::StacksOverBudget,
        "stacks/over_budget",
        "The budget for stacks was used up: the next stack of the same process stands for these bytes too.",
    ),
    (
        Loss::StacksWithoutFrames,
        "stacks/without_frames",
        "Stacks were left out, because the process that unwinds them ended over them or did not send their frames.",
    ),
    (Loss::StacksBadRecords, "stacks/bad_records", "Stack records had the wrong size."),
    (
        Loss::StackProcessesForgotten,
        "stacks/processes_forgotten",
        "More processes than have their mappings cached: they are read again.",
    ),
    (
        Loss::StackMappingsLeftOut,
        "stacks/mappings_left_out",
        "A process had more mappings than are kept: stacks through the rest are cut.",
    ),
    (Loss::ModulesForgotten, "stacks/modules_forgotten", "More modules than are cached: they are read again."),
    (
        Loss::ModulesClosedEarly,
        "stacks/modules_closed_early",
        "More module files than are held open: functions of the closed ones may stay unnamed.",
    ),
    (
        Loss::UnwindInformationTooLarge,
        "stacks/unwind_information_too_large",
        "A module's unwind information is larger than is read: stacks through it are cut.",
    ),
    (
        Loss::StackFilesRefused,
        "stacks/files_refused",
        "Files of a process were left alone, because reading them did not end before: stacks through them are cut.",
    ),
    (
        Loss::StackFilesOverBudget,
        "stacks/files_over_budget",
        "Files of a process were not read, because the budget for stacks was used up: stacks through them are cut.",
    ),
    (
        Loss::StackWorkerReplaced,
        "stacks/worker_replaced",
        "The process that unwinds stacks did not answer or ended, and was replaced: stacks of that moment are missing.",
    ),
    (
        Loss::JournalNotWritten,
        "journal/not_written",
        "The journal could not be written: a replay of it lacks these inputs.",
    ),
    (Loss::CgroupNotWatched, "cgroup/not_watched", "More cgroups at their limit than are watched for being stuck."),
];

impl Loss {
    /// Every loss, in the order of the variants.
    pub fn all() -> impl Iterator<Item = Self> {
        ROWS.iter().map(|(loss, ..)| *loss)
    }

    /// The label: `engine/bad_records`. For losses of the kernel side, the part after `RING/` or
    /// `HOOK/`.
    pub fn label(self) -> &'static str {
        self.row().1
    }

    /// One sentence for people, with a full stop.
    pub fn sentence(self) -> &'static str {
        self.row().2
    }

    /// The loss for a label of a file or a metric, with or without its ring or hook. `None` when
    /// this build does not know the label.
    pub fn of(label: &str) -> Option<Self> {
        let suffix = label.rsplit_once('/').map_or(label, |(_, suffix)| suffix);
        ROWS.iter().find(|(_, known, _)| *known == label || *known == suffix).map(|(loss, ..)| *loss)
    }

    /// A label in the form of this version. Earlier versions wrote some with spaces, and their
    /// journals can still be replayed.
    pub fn canonical(label: &str) -> String {
        label.replace(' ', "_")
    }

    fn row(self) -> &'static Row {
        const UNKNOWN: Row = (Loss::Other, "engine/other_losses", "");
        ROWS.iter().find(|(loss, ..)| *loss == self).unwrap_or(&UNKNOWN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_loss_has_one_row_with_a_label_and_a_sentence() {
        let mut labels: Vec<&str> = Loss::all().map(Loss::label).collect();
        assert_eq!(labels.len(), Loss::CgroupNotWatched as usize + 1);
        for loss in Loss::all() {
            assert_eq!(Loss::of(loss.label()), Some(loss));
            assert!(loss.sentence().ends_with('.'), "{loss:?}");
            assert!(loss.label().bytes().all(|b| b.is_ascii_lowercase() || b"_/".contains(&b)));
        }
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), ROWS.len());
    }

    #[test]
    fn losses_of_the_kernel_side_are_found_by_ring_and_hook() {
        assert_eq!(Loss::of("samples/ring_full"), Some(Loss::RingFull));
        assert_eq!(Loss::of("map/not_run"), Some(Loss::NotRun));
        assert_eq!(Loss::of("something/else"), None);
        assert_eq!(Loss::canonical("stacks/over budget"), Loss::StacksOverBudget.label());
    }
}
