//! A profile for the Firefox Profiler: first touches as stacks weighted in bytes over time, one
//! thread per process, and the memory curve as a counter.
//!
//! The format has no specification but its readers, so the types are those of the crate that samply
//! writes it with.

use std::collections::HashMap;

use fxprof_processed_profile::{
    CategoryColor, CategoryHandle, CpuDelta, Frame as ProfileFrame, FrameFlags, FrameInfo, Profile, ReferenceTimestamp,
    SamplingInterval, StackHandle, ThreadHandle, Timestamp, WeightType,
};
use memtrace_incident::{AllocationPath, Cause, Incident};

use super::{frames, paths, plain};

/// Processes with a thread of their own; the others share one.
const MAX_PROCESSES: usize = 512;
/// Frames of one stack that are written, innermost first; the others are dropped.
const MAX_FRAMES: usize = 512;
/// Extra samples that heavy ones may be split into: a weight of the format is at most 2 GiB. After
/// them the rest of a weight is dropped, which takes a file of more than 128 TiB of growth.
const MAX_SPLITS: u64 = 65_536;

/// The incident's first touches and its curve as JSON. Fails only if the serializer does.
pub fn profile(incident: &Incident) -> serde_json::Result<String> {
    serde_json::to_string(&build(incident))
}

fn build(incident: &Incident) -> Profile {
    let mut rows: Vec<(u64, Option<u32>, u64)> =
        incident.allocations.iter().flat_map(|allocations| allocations.samples.rows()).collect();
    rows.sort_by_key(|(boot_ns, _, _)| *boot_ns);
    let columns = &incident.timeline.columns;
    let mut curve: Vec<(u64, u64)> =
        columns.boot_ns.iter().zip(&columns.usage_bytes).filter_map(|(at, usage)| Some((*at, (*usage)?))).collect();
    curve.sort_by_key(|(boot_ns, _)| *boot_ns);
    let first = rows.first().map(|row| row.0).into_iter().chain(curve.first().map(|reading| reading.0)).min();
    let mut writer = ProfileWriter::new(incident, first.unwrap_or(incident.at.boot_ns));
    for (boot_ns, path, weight) in rows {
        writer.add_sample(boot_ns, path, weight);
    }
    writer.add_curve(&curve);
    writer.profile
}

/// The profile being written, and the handles of what it already has.
struct ProfileWriter<'a> {
    incident: &'a Incident,
    profile: Profile,
    zero_ns: u64,
    user: CategoryHandle,
    kernel: CategoryHandle,
    /// By (pid, start on the boot clock). Cap: [`MAX_PROCESSES`]; then `shared` is used.
    threads: HashMap<(u32, u64), ThreadHandle>,
    /// By index in `allocation_paths`. Cap: the paths of the incident.
    stacks: HashMap<usize, (ThreadHandle, Option<StackHandle>)>,
    shared: Option<ThreadHandle>,
    without_stack: Option<(ThreadHandle, Option<StackHandle>)>,
    splits_left: u64,
}

impl<'a> ProfileWriter<'a> {
    fn new(incident: &'a Incident, zero_ns: u64) -> Self {
        let zero = paths::wall_ns(incident, zero_ns).unwrap_or(0);
        let reference = ReferenceTimestamp::from_millis_since_unix_epoch(zero as f64 / 1e6);
        let product = format!("memtrace incident {}", plain::escape(&incident.id));
        let mut profile = Profile::new(&product, reference, SamplingInterval::from_millis(1));
        profile.set_os_name(&format!("Linux {}", plain::escape(&incident.host.kernel)));
        profile.set_symbolicated(true);
        let user = profile.add_category("User", CategoryColor::Blue);
        let kernel = profile.add_category("Kernel", CategoryColor::Orange);
        Self {
            incident,
            profile,
            zero_ns,
            user,
            kernel,
            threads: HashMap::new(),
            stacks: HashMap::new(),
            shared: None,
            without_stack: None,
            splits_left: MAX_SPLITS,
        }
    }

    fn time(&self, boot_ns: u64) -> Timestamp {
        Timestamp::from_nanos_since_reference(boot_ns.saturating_sub(self.zero_ns))
    }

    fn add_sample(&mut self, boot_ns: u64, path: Option<u32>, weight: u64) {
        let at = path.and_then(|path| usize::try_from(path).ok());
        let found = at.and_then(|at| Some((at, self.incident.allocation_paths.get(at)?)));
        let (thread, stack) = match found {
            Some((_, path)) if path.cause != Cause::Touch => return,
            Some((at, path)) => self.stack_of(at, path),
            None => self.no_stack(),
        };
        let (time, most) = (self.time(boot_ns), i32::MAX.unsigned_abs());
        let mut left = weight;
        loop {
            let part = u32::try_from(left).unwrap_or(u32::MAX).min(most);
            self.profile.add_sample(thread, time, stack, CpuDelta::ZERO, i32::try_from(part).unwrap_or(i32::MAX));
            left -= u64::from(part);
            if left == 0 || self.splits_left == 0 {
                return;
            }
            self.splits_left -= 1;
        }
    }

    fn add_thread(&mut self, name: &str, pid: u32) -> ThreadHandle {
        let start = Timestamp::from_nanos_since_reference(0);
        let process = self.profile.add_process(name, pid, start);
        let thread = self.profile.add_thread(process, pid, start, true);
        self.profile.set_thread_name(thread, name);
        self.profile.set_thread_samples_weight_type(thread, WeightType::Bytes);
        thread
    }

    fn stack_of(&mut self, at: usize, path: &AllocationPath) -> (ThreadHandle, Option<StackHandle>) {
        if let Some(known) = self.stacks.get(&at) {
            return *known;
        }
        let key = (path.process.pid, path.process.start_boot_ns);
        let thread = match (self.threads.get(&key), self.shared) {
            (Some(thread), _) => *thread,
            (None, Some(shared)) if self.threads.len() >= MAX_PROCESSES => shared,
            (None, _) if self.threads.len() >= MAX_PROCESSES => {
                let thread = self.add_thread("more processes", 0);
                self.shared = Some(thread);
                thread
            }
            (None, _) => {
                let thread = self.add_thread(&plain::escape(&path.process.comm), path.process.pid);
                self.threads.insert(key, thread);
                thread
            }
        };
        let mut labels = Vec::new();
        if let Some(cut) = path.cut {
            labels.push((format!("[cut: {}]", cut.name()), false));
        }
        // Innermost frames are kept: they say what grew.
        labels.extend(path.frames.iter().take(MAX_FRAMES).rev().map(|frame| {
            let name = plain::escape(&frames::label(frame));
            let place = paths::place(frame).map(|place| format!(" ({})", plain::escape(&place)));
            (format!("{name}{}", place.unwrap_or_default()), frame.kernel)
        }));
        let stack = self.intern(thread, &labels);
        self.stacks.insert(at, (thread, stack));
        (thread, stack)
    }

    fn no_stack(&mut self) -> (ThreadHandle, Option<StackHandle>) {
        if let Some(known) = self.without_stack {
            return known;
        }
        let thread = self.add_thread("growth without a stack", 0);
        let stack = self.intern(thread, &[("[no stack]".to_owned(), false)]);
        *self.without_stack.insert((thread, stack))
    }

    fn intern(&mut self, thread: ThreadHandle, labels: &[(String, bool)]) -> Option<StackHandle> {
        let frames: Vec<FrameInfo> = (labels.iter())
            .map(|(label, kernel)| FrameInfo {
                frame: ProfileFrame::Label(self.profile.intern_string(label)),
                category_pair: if *kernel { self.kernel.into() } else { self.user.into() },
                flags: FrameFlags::empty(),
            })
            .collect();
        self.profile.intern_stack_frames(thread, frames.into_iter())
    }

    /// Adds the usage of the cgroup as a counter, whose samples are differences between readings.
    fn add_curve(&mut self, curve: &[(u64, u64)]) {
        if curve.is_empty() {
            return;
        }
        let start = Timestamp::from_nanos_since_reference(0);
        // A counter belongs to a process, and the profiler shows a process only if it has a thread.
        let process = self.profile.add_process("cgroup", 0, start);
        let thread = self.profile.add_thread(process, 0, start, true);
        self.profile.set_thread_name(thread, "cgroup");
        let counter = self.profile.add_counter(process, "memory", "Memory", "Usage of the cgroup");
        let mut before = 0u64;
        for (boot_ns, usage) in curve {
            self.profile.add_counter_sample(counter, self.time(*boot_ns), *usage as f64 - before as f64, 0);
            before = *usage;
        }
    }
}

#[cfg(test)]
mod tests {
    use memtrace_incident::{Allocations, fixtures};

    use super::*;

    fn weights(incident: &Incident) -> f64 {
        let json: serde_json::Value = serde_json::from_str(&profile(incident).unwrap()).unwrap();
        let weights = |thread: &serde_json::Value| -> f64 {
            assert!(
                thread["samples"]["weight"].as_array().unwrap().is_empty()
                    || thread["samples"]["weightType"] == "bytes"
            );
            thread["samples"]["weight"].as_array().unwrap().iter().map(|weight| weight.as_f64().unwrap()).sum()
        };
        json["threads"].as_array().unwrap().iter().map(weights).sum()
    }

    #[test]
    fn weights_and_curve_add_up() {
        let burst = fixtures::burst();
        assert_eq!(weights(&burst), burst.allocations.as_ref().unwrap().growth_bytes as f64);
        let json: serde_json::Value = serde_json::from_str(&profile(&burst).unwrap()).unwrap();
        let steps = json["counters"][0]["samples"]["count"].as_array().unwrap();
        let last = burst.timeline.columns.usage_bytes.last().unwrap().unwrap();
        assert_eq!(steps.iter().map(|step| step.as_f64().unwrap()).sum::<f64>(), last as f64);
        assert!(json["meta"]["product"].as_str().unwrap().contains(&burst.id));
    }

    #[test]
    fn more_than_the_format_holds_in_one_sample() {
        let mut burst = fixtures::burst();
        let allocations = burst.allocations.as_mut().unwrap();
        allocations.samples.boot_ns = vec![1, 2];
        allocations.samples.path = vec![Some(0), None];
        allocations.samples.weight_bytes = vec![5 << 32, 7];
        assert_eq!(weights(&burst), ((5u64 << 32) + 7) as f64);
        burst.allocations.as_mut().unwrap().samples.weight_bytes = vec![u64::MAX; 2];
        assert!(weights(&burst) > 0.0);
        burst.allocations = Some(Allocations::default());
        assert_eq!(weights(&burst), 0.0);
    }
}
