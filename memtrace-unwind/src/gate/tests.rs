//! What is announced, refused and paid for.

use std::sync::{Arc, Mutex};

use super::*;
use crate::accounts::LEAST_BURST_NS;
use crate::proc_dir::FileStamp;

#[derive(Debug, Default)]
struct Heard(Arc<Mutex<Vec<Option<Reading>>>>);

impl ReadObserver for Heard {
    fn begin(&mut self, reading: &Reading) {
        self.0.lock().unwrap().push(Some(*reading));
    }

    fn end(&mut self) {
        self.0.lock().unwrap().push(None);
    }

    fn late(&mut self, reading: &Reading, late: usize) {
        assert_eq!(late, 1);
        self.0.lock().unwrap().push(Some(*reading));
    }
}

#[test]
fn a_reading_is_announced_unless_it_is_refused() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let refused =
        Refused { processes: [(7, 1)].into(), devices: [(0, 40)].into(), users: [1000].into(), strangers: false };
    let mut gate = Gate::new(Box::new(Heard(heard.clone())), refused, 1_000_000);
    gate.set_process((8, 1));
    assert_eq!(gate.pass(Place::Device((8, 1)), || 5), Some(5));
    let reading = Reading { process: (8, 1), user: None, place: Place::Device((8, 1)) };
    assert_eq!(gate.pass(Place::Device((8, 1)), || 6), Some(6));
    assert_eq!(*heard.lock().unwrap(), [Some(reading)], "once for both");
    gate.rest();
    gate.rest();
    assert_eq!(*heard.lock().unwrap(), [Some(reading), None]);
    assert_eq!(gate.pass(Place::Device((0, 40)), || 5), None, "the device");
    gate.set_user(Some(1000));
    assert_eq!(gate.pass(Place::Proc, || 5), None, "the user");
    gate.set_process((7, 1));
    assert_eq!(gate.pass(Place::Proc, || 5), None, "the process");
    assert_eq!((gate.counts(), heard.lock().unwrap().len()), (GateCounts { refused: 3, ..GateCounts::default() }, 2));
}

#[test]
fn what_goes_on_for_long_is_announced_again() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let mut gate = Gate::new(Box::new(Heard(heard.clone())), Refused::default(), 1_000_000);
    gate.set_process((8, 1));
    gate.pass(Place::Proc, || ());
    gate.announced = gate.announced.map(|(reading, at)| (reading, at.checked_sub(ANNOUNCED_FOR).unwrap()));
    gate.pass(Place::Proc, || ());
    gate.pass(Place::Proc, || ());
    assert_eq!(heard.lock().unwrap().len(), 2);
}

#[test]
fn what_is_late_is_given_up_and_refused() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let mut gate = Gate::new(Box::new(Heard(heard.clone())), Refused::default(), 1_000_000);
    let (go_on, wait) = std::sync::mpsc::sync_channel::<()>(1);
    gate.set_process((8, 1));
    assert_eq!(gate.pass(Place::Proc, move || wait.recv().is_ok()), None);
    assert_eq!(gate.pass(Place::Proc, || 5), None, "of this process nothing else is read");
    assert_eq!((heard.lock().unwrap().len(), gate.counts().refused), (2, 2), "begun, and late");
    gate.set_process((9, 1));
    assert_eq!(gate.pass(Place::Proc, || 5), Some(5));
    go_on.send(()).unwrap();
}

#[test]
fn file_systems_that_the_host_has_not_are_refused_on_request() {
    let mut gate = Gate { refused: Refused { strangers: true, ..Refused::default() }, ..Gate::default() };
    let memory = rustix::fs::memfd_create("m", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let known = Place::Device(FileStamp::of(&memory.into()).unwrap().device());
    let strange = Place::Device((0, 0));
    gate.set_process((7, 1));
    let passes = |gate: &mut Gate, place| gate.pass(place, || ()).is_some();
    assert!(passes(&mut gate, Place::Proc) && passes(&mut gate, known));
    assert!(!passes(&mut gate, strange) && !passes(&mut gate, Place::Path));
    gate.refuse(Refused::default());
    assert!(passes(&mut gate, strange) && passes(&mut gate, Place::Path));
}

#[test]
fn file_systems_of_others_that_are_slow_are_paid_for() {
    let mut gate = Gate::default();
    let passes = |gate: &mut Gate, pid, place| {
        gate.set_process((pid, 1));
        gate.pass(place, || std::thread::sleep(Duration::from_millis(60))).is_some()
    };
    // No device has this major number; of 0 the host has dozens mounted, and reads them for nothing.
    let read = (0..100).take_while(|pid| passes(&mut gate, *pid, Place::Device((u32::MAX, *pid)))).count();
    assert!((2..30).contains(&read), "{read} were read");
    assert!(!passes(&mut gate, 200, Place::Path) && passes(&mut gate, 200, Place::Proc), "that is the host's");
}

#[test]
fn a_user_with_many_processes_leaves_a_share_to_others() {
    let mut gate = Gate { rate_ppm: Some(1_000_000), ..Gate::default() };
    let mine = Rate::of_user(1_000_000).full_ns;
    let spent = |gate: &mut Gate, pid: u32, user: u32, ns: i64| {
        gate.set_process((pid, 1));
        // What is spent before its user is known is the user's too.
        gate.charge((pid, 1), ns / 2);
        gate.set_user(Some(user));
        gate.charge((pid, 1), ns / 2);
    };
    (1..=16).for_each(|pid| spent(&mut gate, pid, 1000, mine / 16 + 20_000_000));
    for pid in [1, 17] {
        gate.set_process((pid, 1));
        gate.set_user(Some(1000));
        assert!(!gate.affords(), "{pid}");
    }
    gate.set_process((18, 1));
    gate.set_user(Some(1001));
    assert!(gate.affords(), "another user");
}

#[test]
fn a_reading_that_costs_more_than_all_earn_keeps_its_user_waiting_and_nobody_else() {
    let mut gate = Gate { rate_ppm: Some(10_000), ..Gate::default() };
    gate.set_process((7, 1));
    gate.set_user(Some(1000));
    gate.charge((7, 1), 200_000_000);
    assert!(!gate.affords());
    gate.set_process((8, 1));
    gate.set_user(Some(0));
    assert!(gate.affords());
    // Also what is spent before its user is known.
    let mut gate = Gate { rate_ppm: Some(10_000), ..Gate::default() };
    gate.set_process((7, 1));
    gate.charge((7, 1), 200_000_000);
    gate.set_user(Some(1000));
    assert!(!gate.affords());
    gate.set_process((8, 1));
    gate.set_user(Some(0));
    assert!(gate.affords());
}

#[test]
fn what_this_thread_does_between_readings_is_paid_for_beyond_what_is_ordinary() {
    // Nothing is earned, so the balances are those of what was spent.
    let mut gate = Gate { rate_ppm: Some(0), ..Gate::default() };
    let compute = |ns: i64| {
        let begin = cpu_ns();
        while cpu_ns() - begin < ns {}
    };
    gate.set_process((7, 1));
    gate.set_user(Some(1000));
    compute(10 * FREE_NS);
    gate.rest();
    let (of_process, of_user) = gate.balances_ns((7, 1), 1000).unwrap();
    assert!(of_process <= LEAST_BURST_NS - 9 * FREE_NS, "{of_process}");
    assert_eq!(LEAST_BURST_NS - of_process, Rate::of_user(0).full_ns - of_user);
    compute(2 * LEAST_BURST_NS);
    gate.settle();
    assert!(gate.process_owes() && !gate.affords(), "the free time is used up");
    gate.set_process((8, 1));
    gate.set_user(Some(1001));
    assert!(!gate.process_owes() && !gate.user_owes(), "others owe nothing");
    gate.set_user(Some(1000));
    assert!(!gate.process_owes() && gate.user_owes(), "but the user does");
    gate.set_user(Some(1001));
    // What goes on between two processes is nobody's.
    compute(10 * FREE_NS);
    gate.set_process((9, 1));
    gate.set_user(Some(1002));
    gate.rest();
    assert!(gate.balances_ns((8, 1), 1001).unwrap().0 == LEAST_BURST_NS);
    assert!(gate.balances_ns((9, 1), 1002).unwrap().0 > LEAST_BURST_NS - 9 * FREE_NS);
}

#[test]
fn who_is_in_debt_waits_and_others_go_on() {
    let (at, rate) = (Instant::now(), Rate::of_cpu(10_000));
    let mut gate = Gate { rate_ppm: Some(10_000), ..Gate::default() };
    gate.set_process((7, 1));
    gate.charge((7, 1), rate.full_ns + 5_000_000);
    assert!(!gate.affords());
    assert_eq!(gate.pass(Place::Proc, || ()), None);
    assert_eq!(gate.counts().over_budget, 1);
    gate.set_process((8, 1));
    // All together have 40 ms, of which 45 are spent; nobody knows by which user.
    assert!(!gate.affords());
    let later = |seconds| at + Duration::from_secs(seconds);
    assert!(gate.all.balance(later(1), rate.ppm) > 0, "a second at 1 % earns 10 ms");
    assert_eq!(gate.all.balance(later(100), rate.ppm), rate.full_ns, "no more than what is full");
    let mut account = Account::default();
    account.charge(at, rate, 1_000_000_000);
    assert!(account.balance(later(90), rate) < 0 && account.balance(later(100), rate) > 0);
}
