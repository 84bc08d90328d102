//! What bounds the answers: large ones are made at most once in a while and shared, and all that clients have not read
//! yet is bounded in sum.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};

/// How long a large answer is given to everybody who asks.
const FRESH: Duration = Duration::from_secs(1);
/// How long somebody waits until what others wait for is made.
pub(super) const TURN_LIMIT: Duration = Duration::from_secs(5);
/// Bodies that are on their way to clients of TCP, in all, KiB. One that is larger may be on its
/// way alone.
const TCP_BODIES_KIB: u32 = 48 << 10;
/// The same for clients of the unix socket, so that neither keep the others out.
const SOCKET_BODIES_KIB: u32 = 16 << 10;

/// Why a request gets no answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// 503: it may be tried again.
    Busy(&'static str),
    /// 404.
    NoSuchIncident,
    /// 500.
    Failed(String),
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Self::Busy(why) => {
                (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")], format!("{why}\n")).into_response()
            }
            Self::NoSuchIncident => (StatusCode::NOT_FOUND, "no such incident\n").into_response(),
            Self::Failed(why) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{why}\n")).into_response(),
        }
    }
}

/// Something that is made for each who asks while it is small, and at most once in [`FRESH`] when it is large.
#[derive(Debug)]
pub(super) struct Shared<T> {
    /// Whether a value is large.
    large: fn(&T) -> bool,
    /// The latest large one, and when it was made.
    latest: Mutex<Option<(Instant, T)>>,
}

impl<T: Clone> Shared<T> {
    pub(super) fn new(large: fn(&T) -> bool) -> Self {
        Self { large, latest: Mutex::new(None) }
    }

    /// The latest, or a new one. One is made at a time; 503 when it is not one's turn in time.
    pub(super) async fn get(&self, make: impl Future<Output = Result<T, Refusal>>) -> Result<T, Refusal> {
        let turn = tokio::time::timeout(TURN_LIMIT, self.latest.lock()).await;
        let mut latest = turn.map_err(|_| Refusal::Busy("others wait for the same; try again"))?;
        if let Some((_, value)) = latest.as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
            return Ok(value.clone());
        }
        // Given back before the next is made.
        *latest = None;
        let value = make.await?;
        if (self.large)(&value) {
            *latest = Some((Instant::now(), value.clone()));
        }
        Ok(value)
    }

    /// Gives the memory back when nobody asks any more.
    pub(super) fn expire(&self) {
        if let Ok(mut latest) = self.latest.try_lock()
            && latest.as_ref().is_some_and(|(at, _)| at.elapsed() >= FRESH)
        {
            *latest = None;
        }
    }
}

/// What may be on its way to clients.
#[derive(Clone, Debug)]
pub(super) struct BodyBudget {
    left: Arc<Semaphore>,
    /// All of it.
    kib: u32,
}

/// Bytes that count until the last of them is written, or their client is gone.
struct Counted {
    bytes: Bytes,
    _permit: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl BodyBudget {
    /// What clients of TCP share.
    pub(super) fn of_tcp() -> Self {
        Self::new(TCP_BODIES_KIB)
    }

    /// What clients of the unix socket share.
    pub(super) fn of_socket() -> Self {
        Self::new(SOCKET_BODIES_KIB)
    }

    fn new(kib: u32) -> Self {
        Self { left: Arc::new(Semaphore::new(kib as usize)), kib }
    }

    /// The body of an answer, or 503 when clients are slow to read what others are to get.
    pub(super) fn body(&self, bytes: Bytes) -> Result<Body, Refusal> {
        let kib = u32::try_from(bytes.len().div_ceil(1024)).unwrap_or(self.kib).min(self.kib);
        match Arc::clone(&self.left).try_acquire_many_owned(kib) {
            Ok(permit) => Ok(Body::from(Bytes::from_owner(Counted { bytes, _permit: permit }))),
            Err(_) => Err(Refusal::Busy("too much is on its way to slow clients; try again")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn nobody_waits_behind_others_for_ever() {
        let shared = Shared::new(|_: &u32| false);
        let never = shared.get(std::future::pending());
        let asked = async { shared.get(async { Ok(1) }).await.unwrap_err() };
        tokio::select! {
            // So that it is the one that waits for ever that comes first.
            biased;
            _ = never => panic!("nothing was made"),
            refusal = asked => assert!(matches!(refusal, Refusal::Busy(_)), "{refusal:?}"),
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_is_large_is_made_once_and_shared_until_it_is_old() {
        for (large, times) in [(true, 1), (false, 3)] {
            let made = AtomicU32::new(0);
            let shared = if large { Shared::new(|_: &u32| true) } else { Shared::new(|_: &u32| false) };
            for _ in 0..3 {
                shared.get(async { Ok(made.fetch_add(1, Ordering::Relaxed)) }).await.unwrap();
            }
            assert_eq!(made.load(Ordering::Relaxed), times, "large: {large}");
        }
        let shared = Shared::new(|_: &u32| true);
        shared.get(async { Ok(1) }).await.unwrap();
        shared.expire();
        assert!(shared.latest.lock().await.is_some(), "still fresh");
        *shared.latest.lock().await = Instant::now().checked_sub(FRESH).map(|old| (old, 1));
        shared.expire();
        assert!(shared.latest.lock().await.is_none());
    }

    #[test]
    fn bodies_count_until_they_are_gone_and_one_may_be_larger_than_all() {
        let budget = BodyBudget::of_tcp();
        let half = Bytes::from(vec![0; TCP_BODIES_KIB as usize * 512]);
        let (first, second) = (budget.body(half.clone()).unwrap(), budget.body(half.clone()).unwrap());
        let refusal = budget.body(Bytes::from_static(b"x")).unwrap_err();
        assert_eq!(refusal.into_response().status(), StatusCode::SERVICE_UNAVAILABLE);
        drop((first, second));
        let all = budget.body(Bytes::from(vec![0; TCP_BODIES_KIB as usize * 1024 + 1])).unwrap();
        assert!(budget.body(half).is_err());
        drop(all);
        assert!(budget.body(Bytes::from_static(b"x")).is_ok());
        let _all = budget.body(Bytes::from(vec![0; TCP_BODIES_KIB as usize * 1024])).unwrap();
        assert!(BodyBudget::of_socket().body(Bytes::from_static(b"x")).is_ok(), "another budget");
    }
}
