//! Tests that attribution loses no byte and stays within its caps.

use memtrace_incident::{AllocationPath, Allocations};
use proptest::prelude::*;

use super::*;
use crate::input::PathFrame;
use crate::test_support::{MIB, SEC, mm_gone, rss, start, task};

const CGROUP: u64 = 7;

fn path(id: u32, frames: &[&str]) -> PathFound {
    let frame = |name: &&str| PathFrame { name: Some((*name).into()), ..PathFrame::default() };
    PathFound { id, frames: frames.iter().map(frame).collect(), cut: None }
}

fn stack(boot_ns: u64, pid: u32, cause: Cause, weight_bytes: u64, grown_bytes: u64, path: u32) -> StackFound {
    StackFound {
        boot_ns,
        pid,
        tid: pid,
        start_boot_ns: start(pid),
        comm: format!("p{pid}"),
        mm_id: u64::from(pid),
        cgroup_id: CGROUP,
        cause,
        weight_bytes,
        grown_bytes,
        address: None,
        size_bytes: 0,
        path,
    }
}

fn grew(boot_ns: u64, pid: u32, grown_bytes: u64) -> wire::RssChange {
    wire::RssChange { grown_bytes, ..rss(boot_ns, pid, CGROUP, u64::from(pid), grown_bytes) }
}

fn whole() -> Window {
    Window { from_ns: 0, until_ns: u64::MAX, sample_bytes: MIB, thinned: 0 }
}

fn report(attribution: &Attribution, window: &Window) -> (Vec<AllocationPath>, Allocations) {
    let (paths, allocations) = attribution.report(window, |_, _| true);
    (paths, allocations.unwrap())
}

/// Asserts what must hold for every report.
fn adds_up(paths: &[AllocationPath], report: &Allocations) {
    assert_eq!(report.growth_bytes, report.attributed_bytes + report.unattributed_bytes());
    let mut of_path = vec![0; paths.len()];
    let mut without = 0;
    for (_, path, weight) in report.samples.rows() {
        match path {
            Some(path) => of_path[path as usize] += weight,
            None => without += weight,
        }
    }
    assert_eq!(without, report.unattributed_bytes());
    let touched = paths.iter().filter(|path| path.cause == Cause::Touch).map(|path| path.weight_bytes).sum::<u64>();
    assert_eq!(touched, report.attributed_bytes);
    for (path, weight) in paths.iter().zip(of_path) {
        assert_eq!(path.weight_bytes, weight);
        assert!(path.mapped_by.is_none_or(|by| paths[by as usize].cause != Cause::Touch));
    }
    assert!(report.samples.boot_ns.is_sorted());
}

#[test]
fn attributed_and_unattributed_are_what_the_kernel_counted() {
    let mut attribution = Attribution::default();
    attribution.path(&path(1, &["fill", "main"]));
    attribution.rss(&wire::RssChange { reason: wire::RSS_FIRST, ..grew(SEC, 5, 3 * MIB) });
    attribution.stack(&stack(2 * SEC, 5, Cause::Touch, 4 * MIB, 7 * MIB, 1));
    attribution.rss(&grew(3 * SEC, 5, 9 * MIB));
    let (paths, report) = report(&attribution, &whole());
    adds_up(&paths, &report);
    assert_eq!((report.growth_bytes, report.attributed_bytes), (9 * MIB, 4 * MIB));
    let reasons: Vec<(&str, u64)> = report.unattributed.iter().map(|part| (part.why.as_str(), part.bytes)).collect();
    assert_eq!(reasons, [(NoStackReason::Outside.text(), 3 * MIB), (NoStackReason::Pending.text(), 2 * MIB)]);
    assert_eq!(paths[0].process.comm, "p5");
}

#[test]
fn a_window_ends_before_what_grew_after_it() {
    let mut attribution = Attribution::default();
    attribution.path(&path(1, &["fill", "main"]));
    attribution.stack(&stack(SEC, 5, Cause::Touch, 4 * MIB, 4 * MIB, 1));
    attribution.rss(&grew(2 * SEC, 5, 9 * MIB));
    // It grows on while it is killed.
    attribution.stack(&stack(3 * SEC, 5, Cause::Touch, 6 * MIB, 10 * MIB, 1));
    attribution.rss(&grew(4 * SEC, 5, 11 * MIB));
    let (paths, then) = report(&attribution, &Window { until_ns: 2 * SEC, ..whole() });
    adds_up(&paths, &then);
    assert_eq!((then.growth_bytes, then.attributed_bytes), (9 * MIB, 4 * MIB));
    let (paths, all) = report(&attribution, &whole());
    adds_up(&paths, &all);
    assert_eq!((all.growth_bytes, all.attributed_bytes), (11 * MIB, 10 * MIB));
}

#[test]
fn samples_of_two_cpus_may_come_in_another_order() {
    let mut attribution = Attribution::default();
    attribution.path(&path(1, &["fill", "main"]));
    for pair in 0..100 {
        let (at, grown) = (SEC + pair * 1000, 2 * pair * MIB);
        attribution.stack(&stack(at + 1, 5, Cause::Touch, MIB, grown + 2 * MIB, 1));
        attribution.stack(&stack(at, 5, Cause::Touch, MIB, grown + MIB, 1));
    }
    let (paths, report) = report(&attribution, &whole());
    adds_up(&paths, &report);
    assert_eq!((report.growth_bytes, report.attributed_bytes), (200 * MIB, 200 * MIB));
}

#[test]
fn growth_that_no_sample_stands_for_is_reported_when_it_happened() {
    let mut attribution = Attribution::default();
    attribution.path(&path(1, &["fill", "main"]));
    for number in 1..=100 {
        // Another process gave it 30 MiB after the fortieth.
        let outside = if number > 40 { 30 * MIB } else { 0 };
        attribution.stack(&stack(number * SEC, 5, Cause::Touch, MIB, number * MIB + outside, 1));
    }
    let (paths, report) = report(&attribution, &whole());
    adds_up(&paths, &report);
    assert_eq!((report.growth_bytes, report.attributed_bytes), (130 * MIB, 100 * MIB));
    let outside: Vec<u64> = report.samples.rows().filter(|(_, path, _)| path.is_none()).map(|(ns, ..)| ns).collect();
    assert_eq!(outside, [41 * SEC]);
}

#[test]
fn a_stack_that_comes_after_the_end_of_its_process_still_counts() {
    let mut attribution = Attribution::default();
    attribution.path(&path(1, &["fill", "main"]));
    attribution.rss(&grew(SEC, 5, MIB));
    let gone = wire::MmGone { grown_bytes: 6 * MIB, ..mm_gone(2 * SEC, 5, 5, 6 * MIB) };
    attribution.mm_gone(&gone);
    attribution.tick(2 * SEC + LATE_NS / 2, 30 * SEC, None);
    attribution.stack(&stack(2 * SEC - 1, 5, Cause::Touch, 5 * MIB, 5 * MIB, 1));
    attribution.tick(3 * SEC + LATE_NS, 30 * SEC, None);
    assert!(attribution.spaces.is_empty(), "nothing more will come");
    let (paths, report) = report(&attribution, &whole());
    adds_up(&paths, &report);
    assert_eq!((report.growth_bytes, report.attributed_bytes), (6 * MIB, 5 * MIB));
}

#[test]
fn a_touch_is_joined_with_the_call_that_mapped_it() {
    let mut attribution = Attribution::default();
    for (id, frames) in [(1, ["reserve", "main"]), (2, ["fill", "main"]), (3, ["again", "main"])] {
        attribution.path(&path(id, &frames));
    }
    let at = |found: StackFound, address, size_bytes| StackFound { address: Some(address), size_bytes, ..found };
    attribution.stack(&at(stack(1, 5, Cause::Map, 64 * MIB, 0, 1), 0x10_0000_0000, 64 * MIB));
    attribution.stack(&at(stack(2, 5, Cause::Touch, MIB, MIB, 2), 0x10_0000_0000 + 63 * MIB, 0));
    attribution.stack(&at(stack(3, 5, Cause::Touch, MIB, 2 * MIB, 2), 0x10_0000_0000 + 64 * MIB, 0));
    // A mapping in its middle: the part above it is no longer known, the part below it is.
    attribution.stack(&at(stack(4, 5, Cause::Map, 4 * MIB, 0, 3), 0x10_0000_0000 + 32 * MIB, 4 * MIB));
    attribution.stack(&at(stack(5, 5, Cause::Touch, MIB, 3 * MIB, 2), 0x10_0000_0000 + 33 * MIB, 0));
    attribution.stack(&at(stack(6, 5, Cause::Touch, MIB, 4 * MIB, 2), 0x10_0000_0000 + MIB, 0));
    let (paths, report) = report(&attribution, &whole());
    adds_up(&paths, &report);
    let name = |path: &AllocationPath| path.frames[0].symbol.clone().unwrap();
    let touched: Vec<(u64, Option<String>)> = paths
        .iter()
        .filter(|path| path.cause == Cause::Touch)
        .map(|path| (path.weight_bytes, path.mapped_by.map(|by| name(&paths[by as usize]))))
        .collect();
    assert_eq!(touched, [(2 * MIB, Some("reserve".into())), (MIB, None), (MIB, Some("again".into()))]);
}

#[test]
fn a_window_names_a_mapping_made_before_it() {
    let mut attribution = Attribution::default();
    attribution.path(&path(1, &["reserve"]));
    attribution.path(&path(2, &["fill"]));
    let map = StackFound { address: Some(4096), size_bytes: MIB, ..stack(SEC, 5, Cause::Map, MIB, 0, 1) };
    let touch = StackFound { address: Some(4096), ..stack(9 * SEC, 5, Cause::Touch, MIB, MIB, 2) };
    attribution.stack(&map);
    attribution.stack(&touch);
    let (paths, report) = report(&attribution, &Window { from_ns: 5 * SEC, ..whole() });
    adds_up(&paths, &report);
    assert_eq!(paths[1].cause, Cause::Map);
    assert_eq!((paths[0].mapped_by, paths[1].weight_bytes), (Some(1), 0));
}

#[test]
fn a_stack_without_a_frame_of_the_process_is_no_attribution() {
    let mut attribution = Attribution::default();
    let kernel = PathFrame { kernel: true, name: Some("do_anonymous_page".into()), ..PathFrame::default() };
    attribution.path(&PathFound { id: 1, frames: [kernel].into(), cut: Some(Cut::Gone) });
    attribution.stack(&stack(SEC, 5, Cause::Touch, MIB, MIB, 1));
    attribution.stack(&stack(SEC, 5, Cause::Touch, MIB, 2 * MIB, 9));
    let (paths, report) = report(&attribution, &whole());
    adds_up(&paths, &report);
    assert!(paths.is_empty());
    let reasons: Vec<&str> = report.unattributed.iter().map(|part| part.why.as_str()).collect();
    assert_eq!(reasons, [NoStackReason::Gone.text(), NoStackReason::NotKept.text()]);
}

#[test]
fn processes_out_of_scope_are_left_out_and_no_stacks_are_no_report() {
    let mut attribution = Attribution::default();
    attribution.path(&path(1, &["fill"]));
    attribution.stack(&stack(SEC, 5, Cause::Touch, MIB, MIB, 1));
    attribution.stack(&stack(SEC, 6, Cause::Touch, MIB, 3 * MIB, 1));
    let (paths, report) = attribution.report(&whole(), |_, (pid, _)| pid == 6);
    adds_up(&paths, &report.unwrap());
    assert_eq!(paths.iter().map(|path| path.process.pid).collect::<Vec<_>>(), [6]);
    assert_eq!(attribution.report(&Window { sample_bytes: 0, ..whole() }, |_, _| true), (Vec::new(), None));
}

#[test]
fn old_samples_are_dropped_unless_a_recording_needs_them() {
    let mut attribution = Attribution::default();
    attribution.path(&path(1, &["fill"]));
    attribution.stack(&stack(SEC, 5, Cause::Touch, MIB, MIB, 1));
    attribution.tick(500 * SEC, 30 * SEC, Some(SEC / 2));
    assert_eq!(attribution.samples.len(), 1);
    attribution.tick(500 * SEC, 30 * SEC, None);
    assert!(attribution.samples.is_empty());
}

#[test]
fn after_exec_a_process_has_the_name_of_its_new_program() {
    let mut attribution = Attribution::default();
    attribution.path(&path(1, &["fill"]));
    attribution.stack(&StackFound { comm: "sh".into(), ..stack(SEC, 5, Cause::Touch, MIB, MIB, 1) });
    attribution.rss(&grew(2 * SEC, 5, MIB));
    assert_eq!(report(&attribution, &whole()).0[0].process.comm, crate::world::comm(&task(5)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    /// Any inputs in any order add up and stay within the caps.
    #[test]
    fn it_always_adds_up(events in proptest::collection::vec(
        (0u8..5, 0u64..40, 0u32..6, 0u64..1 << 24, 0u64..1 << 30, 0u32..40), 0..400)) {
        let mut attribution = Attribution::default();
        for (kind, at, pid, weight, grown, id) in events {
            let at = at * SEC;
            match kind {
                0 => attribution.path(&path(id, &["f", "main"])),
                1 => attribution.rss(&grew(at, pid, grown)),
                2 => attribution.mm_gone(&mm_gone(at, pid, u64::from(pid), grown)),
                3 => attribution.tick(at, 5 * SEC, None),
                _ => {
                    let cause = [Cause::Touch, Cause::Map, Cause::Brk, Cause::Charge][(grown % 4) as usize];
                    let found = stack(at, pid, cause, weight, grown, id);
                    attribution.stack(&StackFound { address: Some(grown % 64), size_bytes: weight % 32, ..found });
                }
            }
            prop_assert!(attribution.samples.len() < SAMPLES_CAP);
        }
        for from in [0, 3, 20] {
            let (paths, report) = report(&attribution, &Window { from_ns: from * SEC, ..whole() });
            adds_up(&paths, &report);
        }
    }
}

#[test]
fn joining_loses_no_byte_and_keeps_order() {
    let mut samples: Vec<Sample> = (0..1000u64)
        .map(|at| Sample {
            boot_ns: at * 1_000_000,
            cgroup: CGROUP,
            task: 0,
            of: Ok(PathKey { task: 0, cause: Cause::Touch, path: (at % 3) as u32, mapped_by: None }),
            weight: at,
        })
        .collect();
    let before: u64 = samples.iter().map(|sample| sample.weight).sum();
    let joined = join(&mut samples, 100);
    assert!(samples.len() <= 100 && joined == 1000 - samples.len() as u64, "{}", samples.len());
    assert_eq!(samples.iter().map(|sample| sample.weight).sum::<u64>(), before);
    assert!(samples.iter().is_sorted_by_key(|sample| sample.boot_ns));
}

#[test]
fn samples_and_paths_above_the_cap_are_joined_or_dropped() {
    let mut attribution = Attribution::default();
    for id in 0..paths::PATHS_CAP as u32 + 10 {
        attribution.path(&path(id, &["f"]));
    }
    let last = paths::PATHS_CAP as u32;
    for at in 0..SAMPLES_CAP as u64 + 100 {
        let id = last - (at % 50) as u32;
        attribution.stack(&stack(at * 1000, 5, Cause::Touch, 4096, (at + 1) * 4096, id));
    }
    assert!(attribution.samples.len() < SAMPLES_CAP && attribution.joined > 0);
    let (paths, report) = report(&attribution, &whole());
    adds_up(&paths, &report);
    assert_eq!(report.growth_bytes, (SAMPLES_CAP as u64 + 100) * 4096);
    assert_eq!(paths.len(), 50);
}

/// More processes than samples fit, so that none can be joined with another. Searching for
/// neighbours at every sample would take hours here.
#[test]
fn a_storm_of_processes_costs_history_and_is_counted() {
    let mut attribution = Attribution::default();
    let storm = 2 * SAMPLES_CAP as u64;
    for at in 0..storm {
        let pid = u32::try_from(at + 1).unwrap();
        attribution.push(Sample {
            boot_ns: at * 1000,
            cgroup: CGROUP,
            task: pid,
            of: Err(NoStackReason::Pending),
            weight: 4096,
        });
        assert!(attribution.samples.len() < SAMPLES_CAP);
    }
    assert_eq!(attribution.samples.len() as u64 + attribution.dropped, storm);
    assert!(attribution.dropped > 0 && attribution.samples.back().unwrap().boot_ns == (storm - 1) * 1000);
}
