//! Tests of the thread that saves incidents.

use memtrace_incident::fixtures;

use super::queue::{MAX_WAITING, MAX_WAITING_BYTES, bytes_of};
use super::*;

const LIMIT: Duration = Duration::from_secs(60);

fn storer(dir: &Path, most_bytes: u64) -> Storer {
    let store = IncidentStore::create(dir).unwrap();
    let retention = Retention::of(&store, most_bytes, Duration::from_hours(1000)).unwrap();
    Storer::start(store, retention).unwrap()
}

/// One with an id of its own, up to 1 << 20.
fn incident(n: usize) -> Box<Incident> {
    let mut incident = fixtures::burst();
    incident.id.truncate(21);
    incident.id.push_str(&format!("{n:05}"));
    Box::new(incident)
}

/// The same with a curve that takes a third of a MiB.
fn large(n: usize) -> Box<Incident> {
    let mut incident = incident(n);
    incident.timeline.columns.boot_ns = vec![1; 2000];
    incident
}

fn ids(store: &Path) -> Vec<String> {
    IncidentStore::at(store).list().unwrap().into_iter().map(|file| file.id).collect()
}

/// Waits until nothing is left to be packed.
fn until_packed(storer: &Storer) {
    let deadline = Instant::now() + LIMIT;
    while storer.0.state().waiting.has_whole() || storer.0.state().in_packing.is_some() {
        assert!(Instant::now() < deadline, "not packed");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn incidents_are_saved_and_handed_back_for_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let storer = storer(dir.path(), 1 << 30);
    for n in 0..3 {
        storer.save(incident(n));
    }
    assert!(storer.finish(LIMIT).is_empty());
    let saved = storer.take_saved();
    assert_eq!(saved.len(), 3);
    assert!(saved.iter().all(|saved| saved.path.is_file()), "{saved:?}");
    assert_eq!(storer.counts().saved.values().sum::<u64>(), 3);
    assert_eq!((storer.waiting(), storer.take_saved().len()), (0, 0));
}

#[test]
fn what_cannot_be_saved_waits_and_is_saved_when_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let storer = storer(&state, 1 << 30);
    std::fs::remove_dir_all(&state).unwrap();
    storer.save(incident(1));
    storer.save(incident(2));
    assert_eq!(storer.finish(LIMIT).len(), 2, "each was tried once, and waits");
    assert!(storer.counts().write_failures >= 2, "{:?}", storer.counts());
    assert_eq!(storer.waiting(), 2);
    std::fs::create_dir(&state).unwrap();
    assert!(storer.finish(LIMIT).is_empty());
    assert_eq!((storer.take_saved().len(), storer.waiting()), (2, 0));
}

#[test]
fn beyond_its_cap_the_oldest_is_given_up_while_saving_fails() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let storer = storer(&state, 1 << 30);
    std::fs::remove_dir_all(&state).unwrap();
    storer.save(incident(0));
    storer.finish(LIMIT);
    // One more than fits, as one is in hand.
    for n in 1..=MAX_WAITING + 1 {
        storer.save(incident(n));
    }
    assert!(storer.counts().given_up >= 1, "{:?}", storer.counts());
    assert!(storer.waiting() <= MAX_WAITING as u64 + 1);
}

#[test]
fn a_ledger_is_synced_and_old_files_are_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let storer = storer(dir.path(), 1);
    storer.sync([File::create(dir.path().join("ledger")).unwrap()]);
    storer.save(incident(1));
    storer.review();
    assert!(storer.finish(LIMIT).is_empty());
    let counts = storer.counts();
    assert_eq!((counts.write_failures, counts.dropped), (0, 1));
}

#[test]
fn ledgers_that_are_written_to_all_the_time_keep_no_incident_from_being_saved() {
    let file = || tempfile::tempfile().unwrap();
    let mut state = State::default();
    state.waiting.put_packed(PackedIncident::of(&incident(1), 0).unwrap());
    state.waiting.put_packed(PackedIncident::of(&incident(2), 0).unwrap());
    let mut jobs = Vec::new();
    for _ in 0..4 {
        state.unsynced.push_back(file());
        state.syncs_queued += 1;
        jobs.push(match state.take_job() {
            Some(Job::Sync(_)) => "sync",
            Some(Job::Save(_)) => "save",
            _ => "other",
        });
    }
    assert_eq!(jobs, ["sync", "save", "sync", "save"]);
    assert_eq!(state.waiting.len(), 0);
}

#[test]
fn an_incident_is_written_after_the_sync_that_was_asked_for_before_it() {
    let mut state = State::default();
    for after in 1..=2 {
        state.unsynced.push_back(tempfile::tempfile().unwrap());
        state.syncs_queued += 1;
        state.waiting.put_packed(PackedIncident::of(&incident(after as usize), after).unwrap());
    }
    state.waiting.take_packed(false);
    let jobs = std::iter::from_fn(|| state.take_job()).map(|job| matches!(job, Job::Save(_)));
    assert_eq!(jobs.collect::<Vec<_>>(), [false, false, true]);
}

#[test]
fn a_disk_that_is_away_costs_no_incident_of_a_storm() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let storer = storer(&state, 1 << 30);
    std::fs::remove_dir_all(&state).unwrap();
    let count = 2 * MAX_WAITING_BYTES / bytes_of(&large(0));
    assert!((150..MAX_WAITING).contains(&count), "{count}");
    for n in 0..count {
        storer.sync([tempfile::tempfile().unwrap()]);
        storer.save(large(n));
        if n % 20 == 0 {
            until_packed(&storer);
        }
    }
    assert_eq!((storer.counts().given_up, storer.waiting()), (0, count as u64));
    std::fs::create_dir(&state).unwrap();
    assert!(storer.finish(LIMIT).is_empty());
    assert_eq!((ids(&state).len(), storer.counts().saved.values().sum::<u64>()), (count, count as u64));
}

#[test]
fn one_that_cannot_be_saved_keeps_no_other_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let storer = storer(dir.path(), 1 << 30);
    let bad = incident(7);
    std::fs::create_dir_all(dir.path().join(format!("{}.memtrace/x", bad.id))).unwrap();
    for n in [7, 1, 2, 3, 4, 5] {
        storer.save(incident(n));
    }
    assert_eq!(storer.finish(LIMIT), [bad.id]);
    assert_eq!((ids(dir.path()).len(), storer.waiting()), (5, 1));
}

#[test]
fn what_is_packed_does_not_go_for_what_is_not() {
    let mut waiting = Waiting::default();
    let whole = bytes_of(&large(0));
    let fit = MAX_WAITING_BYTES / whole;
    for n in 0..100 {
        waiting.put_packed(PackedIncident::of(&incident(n), 0).unwrap());
    }
    let given_up = (100..100 + 3 * fit).flat_map(|n| waiting.put(large(n), 0));
    let given_up: Vec<String> = given_up.map(|incident| incident.id().to_owned()).collect();
    // Oldest first, and of the packed ones none after the others take half of the room.
    assert!(given_up.len() >= 2 * fit && given_up.iter().all(|id| *id >= incident(100).id), "{}", given_up.len());
    assert!(waiting.ids().any(|id| *id == incident(0).id));
    let before = waiting.len();
    while waiting.take_whole().is_some() {}
    while waiting.take_packed(true).is_some() {}
    assert_eq!(waiting, Waiting::default(), "{before} were there, and are not counted any more");
}
