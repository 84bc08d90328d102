//! The thread that reads files for the server, so that the server itself opens none: it has a filter that allows
//! reading and refuses changes, and the server one that refuses any path.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Sender, channel};

use anyhow::Context;
use tokio::sync::oneshot;

use crate::own_process::rights::INCIDENTS;

/// A reading and what becomes of it.
type Job = Box<dyn FnOnce() + Send>;

/// The thread, seen from the server. It ends with the last of its handles.
#[derive(Clone, Debug)]
pub(super) struct Reader(Sender<Job>);

impl Reader {
    /// Starts the thread.
    pub(super) fn start() -> anyhow::Result<Self> {
        let (jobs, waiting) = channel::<Job>();
        let run = move || {
            INCIDENTS.enter();
            for job in waiting {
                // One that fails has no answer, and the next one is read all the same.
                let _ = catch_unwind(AssertUnwindSafe(job));
            }
        };
        let thread = std::thread::Builder::new().name(INCIDENTS.thread.to_owned());
        thread.spawn(run).context("failed to start the thread that reads incidents")?;
        Ok(Self(jobs))
    }

    /// What `read` returns; `None` when it fails to return. It is run even if nobody waits any longer. The caller bounds
    /// how many wait.
    pub(super) async fn run<T: Send + 'static>(&self, read: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.0.send(Box::new(move || drop(reply.send(read())))).ok()?;
        answer.await.ok()
    }
}
