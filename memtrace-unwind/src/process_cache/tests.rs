//! The caps of what is known of processes, who loses what at them, and what a process pays for.

use std::process::{Child, Command};

use super::*;
use crate::gate::cpu_ns;
use crate::perf_map;
use crate::unwind::Truncation;

/// What clocks are read for, and what is free for one stack, nanoseconds.
const SLACK_NS: i64 = 1_000_000;

/// A process that does nothing, and its perf map.
struct Sleeper {
    child: Child,
    key: ProcessKey,
}

impl Sleeper {
    fn start() -> Self {
        let child = Command::new("/bin/sleep").arg("600").spawn().unwrap();
        let start_ns = ProcDir::of(child.id()).unwrap().start_ticks().unwrap() * 10_000_000;
        Self { key: (child.id(), start_ns), child }
    }

    fn map(&self) -> String {
        format!("/tmp/perf-{}.map", self.child.id())
    }

    /// Another file in place of the map, of about as many bytes as are read at once.
    fn replace_map(&self) {
        let _ = std::fs::remove_file(self.map());
        let lines: String = (0..60_000).map(|at| format!("{:x} 8 f\n", 0x100_0000 + at * 16)).collect();
        std::fs::write(self.map(), lines).unwrap();
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.map());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Debug)]
struct Deaf;

impl crate::gate::ReadObserver for Deaf {
    fn begin(&mut self, _: &crate::gate::Reading) {}
    fn end(&mut self) {}
    fn late(&mut self, _: &crate::gate::Reading, _: usize) {}
}

/// A cache whose accounts earn nothing, so that they say what was spent.
fn poor_cache() -> ProcessCache {
    ProcessCache::new(Gate::new(Box::new(Deaf), Refused::default(), 0))
}

/// A process of this user with so many executable mappings.
fn hold_maps(cache: &mut ProcessCache, key: ProcessKey, user: u32, mappings: u64) {
    let line = |at: u64| format!("{:x}-{:x} r-xp 00000000 00:00 0\n", at * 0x2000, at * 0x2000 + 0x1000);
    let maps = Maps::parse((1..=mappings).map(line).collect::<String>().as_bytes());
    let modules = vec![MappedModule::Anonymous; maps.all().len()];
    cache.lookup_or_insert(key);
    let process = cache.processes.get_mut(&key).unwrap();
    process.credentials = Arc::new(Credentials { users: vec![user; 4], ..Credentials::default() });
    let code = process.code.insert(MappedCode { maps, modules });
    cache.map_bytes += code.memory_estimate();
    cache.make_room_for_maps(key);
}

fn held_map_bytes(cache: &ProcessCache) -> usize {
    cache.processes.values().filter_map(|process| process.code.as_ref()).map(MappedCode::memory_estimate).sum()
}

#[test]
fn thousands_of_processes_leave_no_more_than_the_cap_and_evict_their_own() {
    let mut cache = ProcessCache::default();
    hold_maps(&mut cache, (1, 1), 0, 10);
    for pid in 0..3000 {
        cache.lookup_or_insert((u32::MAX - pid, 7));
        assert!(cache.processes.len() <= MAX_PROCESSES, "{pid}");
        assert!(cache.processes.contains_key(&(1, 1)), "{pid}: another user is evicted");
    }
    assert_eq!(cache.processes.len() as u64 + cache.counts.forgotten, 3001);
}

#[test]
fn mappings_are_bounded_and_users_evict_their_own() {
    let mut cache = ProcessCache::default();
    hold_maps(&mut cache, (1, 1), 0, 100);
    for pid in 2..60 {
        hold_maps(&mut cache, (pid, 1), 1000 + pid % 2, maps::MAX_MAPPINGS as u64);
        assert!(cache.map_bytes <= MAX_MAP_BYTES, "{pid}");
        assert_eq!(held_map_bytes(&cache), cache.map_bytes, "{pid}");
        assert!(cache.processes.contains_key(&(1, 1)), "{pid}: the third user is evicted");
    }
    assert!(cache.counts.forgotten > 0);
}

#[test]
fn perf_maps_are_bounded() {
    let mut cache = ProcessCache::default();
    let sleepers: Vec<Sleeper> = (0..12).map(|_| Sleeper::start()).collect();
    for sleeper in &sleepers {
        sleeper.replace_map();
        cache.lookup_or_insert(sleeper.key);
        // On a busy machine much of the time that a reading takes is not its file's.
        cache.modules.gate.forget_waiting();
        assert!(cache.read_maps(sleeper.key) && cache.read_jit(sleeper.key));
        let held = cache.processes.values().filter_map(|process| process.jit.as_ref());
        assert_eq!(held.map(PerfMap::memory_estimate).sum::<usize>(), cache.jit_bytes);
        assert!(cache.jit_bytes <= MAX_JIT_BYTES);
    }
    assert!(cache.counts.forgotten > 0, "{} bytes", cache.jit_bytes);
}

#[test]
fn a_perf_map_that_is_replaced_is_paid_for_until_nothing_is_read_any_more() {
    let (mut cache, sleeper) = (poor_cache(), Sleeper::start());
    cache.lookup_or_insert(sleeper.key);
    assert!(cache.read_maps(sleeper.key));
    let user = cache.processes[&sleeper.key].credentials.user().unwrap();
    let before_ns = cache.modules.gate.balances_ns(sleeper.key, user).unwrap();
    let (mut here_ns, mut read) = (0, 0);
    while !cache.modules.gate.process_owes() && read < 10_000 {
        sleeper.replace_map();
        let begin_ns = cpu_ns();
        cache.lookup_or_insert(sleeper.key);
        read += u32::from(cache.read_jit(sleeper.key));
        cache.modules.gate.rest();
        here_ns += cpu_ns() - begin_ns - SLACK_NS;
    }
    let after_ns = cache.modules.gate.balances_ns(sleeper.key, user).unwrap();
    assert!(before_ns.0 - after_ns.0 >= here_ns, "{here_ns} ns of {read} readings: {before_ns:?} to {after_ns:?}");
    assert!(before_ns.1 - after_ns.1 >= here_ns, "the user pays as well");
    let functions = cache.processes[&sleeper.key].jit.as_ref().map_or(0, PerfMap::memory_estimate);
    assert!(functions > 0 && read >= 1 && functions <= perf_map::MAX_FUNCTIONS * 64, "{functions} bytes");
    sleeper.replace_map();
    cache.lookup_or_insert(sleeper.key);
    assert!(!cache.read_jit(sleeper.key), "in debt");
}

#[inline(never)]
fn first(number: u64) -> u64 {
    std::hint::black_box(number).rotate_left(7)
}

#[inline(never)]
fn second(number: u64) -> u64 {
    std::hint::black_box(number).count_ones().into()
}

#[inline(never)]
fn third(number: u64) -> u64 {
    std::hint::black_box(number).leading_zeros().into()
}

#[inline(never)]
fn caller() {
    std::hint::black_box(first(1) + second(2) + third(3));
}

#[test]
fn a_process_in_debt_has_the_rules_that_are_cached_and_no_new_ones_and_others_of_its_user_do() {
    let pid = std::process::id();
    let key = (pid, ProcDir::of(pid).unwrap().start_ticks().unwrap() * 10_000_000);
    // Earns enough for everything, until it owes.
    let mut cache = ProcessCache::new(Gate::new(Box::new(Deaf), Refused::default(), 1_000_000));
    let return_address = (caller as fn() as usize as u64) + 1;
    let at = |cache: &mut ProcessCache, function: fn(u64) -> u64| {
        let lr = cfg!(target_arch = "aarch64").then_some(return_address);
        let registers = Registers { ip: std::hint::black_box(function) as usize as u64, sp: 0x1000, fp: 0, lr };
        cache.unwind(SampleMoment::now(key), registers, &return_address.to_le_bytes(), &[]).unwrap()
    };
    assert_eq!(at(&mut cache, first).frames.len(), 2);
    // Another process of the user: most containers have the same.
    let user = ProcDir::of(pid).unwrap().credentials().unwrap().user();
    cache.modules.gate.charge_to((1, 1), user, 1_000_000_000_000);
    assert_eq!(at(&mut cache, third).frames.len(), 2, "its data is read already");
    cache.modules.gate.charge(key, 1_000_000_000_000);
    let known = at(&mut cache, first);
    assert_eq!(known.frames.len(), 2, "{known:?}");
    let unknown = at(&mut cache, second);
    assert_eq!((unknown.frames.len(), unknown.truncation), (1, Some(Truncation::UnwindInfo)));
}
