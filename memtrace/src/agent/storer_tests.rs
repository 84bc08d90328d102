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
    state.put_packed(PackedIncident::of(&incident(1)).unwrap());
    state.put_packed(PackedIncident::of(&incident(2)).unwrap());
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
    assert_eq!((state.waiting(), state.waiting_bytes), (0, 0));
}

#[test]
fn while_many_wait_they_are_packed_and_some_are_written() {
    let mut state = State::default();
    for n in 0..60 {
        state.put_whole(incident(n));
    }
    let (mut packed, mut runs) = (0, Vec::new());
    while let Some(job) = state.take_job() {
        match job {
            Job::Pack(incident) => {
                state.put_packed(PackedIncident::of(&incident).unwrap());
                packed += 1;
            }
            Job::Save(_) => runs.push(std::mem::take(&mut packed)),
            _ => panic!("neither was asked for"),
        }
    }
    // 16 in turn, then 4 until 8 are left; those are packed when nothing else is to be written.
    assert_eq!(runs.iter().sum::<usize>(), 60);
    assert_eq!(runs.get(..4), Some([16, 16, 16, 4].as_slice()));
    assert!(runs.get(4..52).is_some_and(|runs| runs.iter().all(|packed| *packed == 0)), "{runs:?}");
    assert!(runs.get(52..).is_some_and(|runs| runs.iter().all(|packed| *packed == 1)), "{runs:?}");
    assert_eq!((state.waiting(), state.waiting_bytes), (0, 0));
}

#[test]
fn a_disk_that_is_away_costs_no_incident_of_a_storm() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let storer = storer(&state, 1 << 30);
    std::fs::remove_dir_all(&state).unwrap();
    let count = 2 * MAX_WAITING_BYTES / bytes_of(&incident(0));
    let count = count.min(MAX_WAITING - 1);
    for n in 0..count {
        storer.save(incident(n));
        let deadline = Instant::now() + LIMIT;
        while storer.0.state().whole.len() > MAX_WHOLE && Instant::now() < deadline {
            thread::yield_now();
        }
    }
    assert_eq!((storer.counts().given_up, storer.waiting()), (0, count as u64));
    std::fs::create_dir(&state).unwrap();
    assert!(storer.finish(LIMIT).is_empty());
    assert_eq!(storer.counts().saved.values().sum::<u64>(), count as u64);
}
