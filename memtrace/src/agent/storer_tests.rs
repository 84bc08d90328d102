//! Tests of the thread that saves incidents.

use memtrace_incident::fixtures;

use super::*;

const LIMIT: Duration = Duration::from_secs(60);

fn storer(dir: &Path, most_bytes: u64) -> Storer {
    let store = IncidentStore::create(dir).unwrap();
    let retention = Retention::of(&store, most_bytes, Duration::from_hours(1000)).unwrap();
    Storer::start(store, retention).unwrap()
}

fn incident(n: usize) -> Box<Incident> {
    let mut incident = fixtures::burst();
    let last = char::from_digit(u32::try_from(n % 10).unwrap(), 10).unwrap();
    incident.id.pop();
    incident.id.push(last);
    Box::new(incident)
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
    for n in 1..=MAX_WAITING_FAILED {
        storer.save(incident(n));
    }
    assert!(storer.counts().given_up >= 1, "{:?}", storer.counts());
    assert!(storer.waiting() <= MAX_WAITING_FAILED as u64 + 1);
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
    state.put_waiting(incident(1));
    state.put_waiting(incident(2));
    let mut jobs = Vec::new();
    for _ in 0..4 {
        state.unsynced.push_back(file());
        jobs.push(match state.take_job() {
            Some(Job::Sync(_)) => "sync",
            Some(Job::Save(_)) => "save",
            _ => "other",
        });
    }
    assert_eq!(jobs, ["sync", "save", "sync", "save"]);
    assert_eq!((state.waiting.len(), state.waiting_bytes), (0, 0));
}
