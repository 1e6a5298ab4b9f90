//! Sockets at a path, which other processes of the same user connect to.
//!
//! Story: the control socket and the export socket listen by a [`Listener`], on the event loop.
//!
//! Holds: a socket that somebody listens on is left alone, whatever kind it is of. Where the host has no descriptor for a connection,
//! it waits in the queue, and the event loop looks again after [`PAUSE`]: a connection that cannot be had wakes it for ever else.
//!
//! Limits: two of us that begin at the same path at the same moment may take each other for stale; the later one is reached.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vmm_sys_util::timerfd::TimerFd;

use crate::vm::add;

/// How long connections are left in the queue when the host has no descriptor for one.
pub const PAUSE: Duration = Duration::from_millis(100);
/// Connections that wait to be had.
const BACKLOG: i32 = 16;

/// A socket that is listened on.
pub struct Listener {
    socket: OwnedFd,
    /// Runs while it is not.
    pause: TimerFd,
    warned: bool,
}

impl Listener {
    /// Listens at `path`, where only this user may connect from the first moment on. A socket that nobody listens on any more is
    /// replaced; anything else there is left alone.
    ///
    /// # Errors
    ///
    /// When the path is taken or cannot be made.
    pub fn bind(path: &Path, kind: SocketType) -> io::Result<Listener> {
        let address = SocketAddrUnix::new(path)?;
        if is_stale(path, &address) {
            fs::remove_file(path)?;
        }
        let socket = open(kind)?;
        // A socket's mode before it is bound is what its file gets, less the umask. The umask of a process is that of all its
        // threads, and is left alone.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        rustix::net::bind(&socket, &address)?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(Listener { socket, pause: TimerFd::new().map_err(io::Error::from)?, warned: false })
    }

    /// Has the event loop look for connections.
    pub fn watch(&self, ops: &mut EventOps) {
        for fd in [self.socket.as_raw_fd(), self.pause.as_raw_fd()] {
            add(ops, Events::new_raw(fd, EventSet::IN));
        }
    }

    /// Whether an event is of this.
    pub fn is_of(&self, fd: RawFd) -> bool {
        fd == self.socket.as_raw_fd() || fd == self.pause.as_raw_fd()
    }

    /// What there is to be had by an event: a connection, which does not block.
    pub fn accept(&mut self, fd: RawFd, ops: &mut EventOps) -> Option<OwnedFd> {
        if fd == self.pause.as_raw_fd() {
            let _ = self.pause.wait();
            add(ops, Events::new(&self.socket, EventSet::IN));
            return None;
        }
        match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => Some(socket),
            Err(why @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) => {
                self.pause(why, ops);
                None
            }
            // Whoever it was has gone again.
            Err(_) => None,
        }
    }

    fn pause(&mut self, why: Errno, ops: &mut EventOps) {
        if !std::mem::replace(&mut self.warned, true) {
            log::warn!("connections wait, the host has nothing left for them: {why}; this is said once");
        }
        if self.pause.reset(PAUSE, None).is_ok() {
            let _ = ops.remove(Events::empty(&self.socket));
        }
    }
}

fn open(kind: SocketType) -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
}

/// A socket there that nobody listens on: of that alone the host says so. One of another kind, or whose queue is full, is somebody's.
fn is_stale(path: &Path, address: &SocketAddrUnix) -> bool {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    let refused = |socket: OwnedFd| matches!(rustix::net::connect(&socket, address), Err(Errno::CONNREFUSED));
    is_socket && open(SocketType::STREAM).is_ok_and(refused)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
    use rustix::net::connect;
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    use super::*;

    const KINDS: [SocketType; 2] = [SocketType::STREAM, SocketType::SEQPACKET];

    #[test]
    fn a_socket_that_somebody_listens_on_is_left_alone_whatever_its_kind_and_however_busy() {
        let folder = tempfile::tempdir().expect("a folder");
        for theirs in KINDS {
            let path = folder.path().join(format!("{theirs:?}"));
            let address = SocketAddrUnix::new(&path).expect("a short path");
            let live = Listener::bind(&path, theirs).expect("a socket");
            let mode = fs::metadata(&path).expect("a file").permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            let are_refused = || KINDS.iter().all(|ours| Listener::bind(&path, *ours).is_err());
            assert!(are_refused(), "{theirs:?}");
            let connected = || {
                let client = open(theirs).expect("a socket");
                connect(&client, &address).is_ok().then_some(client)
            };
            let waiting: Vec<OwnedFd> = std::iter::from_fn(connected).collect();
            assert!(are_refused(), "{theirs:?}, whose queue is full");
            // With those of us that have looked whether it is stale.
            assert!(waiting.len() + KINDS.len() >= BACKLOG as usize);
            drop(live);
            for ours in KINDS {
                drop(Listener::bind(&path, ours).expect("nobody listens any more"));
            }
        }
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        assert!(Listener::bind(file.path(), SocketType::STREAM).is_err());
        assert!(file.path().exists());
    }

    struct Accepting {
        listener: Listener,
        had: Vec<OwnedFd>,
    }

    impl MutEventSubscriber for Accepting {
        fn process(&mut self, events: Events, ops: &mut EventOps) {
            let had = self.listener.accept(events.fd(), ops);
            self.had.extend(had);
        }

        fn init(&mut self, ops: &mut EventOps) {
            self.listener.watch(ops);
        }
    }

    /// In a process of its own, whose descriptors it takes all.
    #[test]
    fn a_connection_that_there_is_no_descriptor_for_waits_and_wakes_nobody_meanwhile() {
        const NAME: &str =
            "socket::tests::a_connection_that_there_is_no_descriptor_for_waits_and_wakes_nobody_meanwhile";
        if std::env::var_os("UMBRA_OWN_PROCESS").is_none() {
            let this = std::env::current_exe().expect("this test");
            let mut alone = std::process::Command::new(this);
            let ran =
                alone.args(["--exact", NAME, "--test-threads=1"]).env("UMBRA_OWN_PROCESS", "1").output();
            let ran = ran.expect("it can be run");
            assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stdout));
            return;
        }
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let listener = Listener::bind(&path, SocketType::STREAM).expect("a socket");
        let mut events = EventManager::new().expect("descriptors");
        let id = events.add_subscriber(Accepting { listener, had: Vec::new() });
        let client = open(SocketType::STREAM).expect("a socket");
        connect(&client, &SocketAddrUnix::new(&path).expect("a short path")).expect("somebody listens");
        let before = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(0), ..before }).expect("less");
        // The connection, which cannot be had; and nothing more, but for the end of the pause.
        let mut woken = || events.run_with_timeout(PAUSE.as_millis() as i32 / 4).expect("events");
        assert_eq!((woken(), woken()), (1, 0));
        setrlimit(Resource::Nofile, before).expect("as before");
        let had = loop {
            events.run_with_timeout(-1).expect("events");
            let accepting = events.subscriber_mut(id).expect("it is there");
            if let Some(had) = accepting.had.pop() {
                break had;
            }
        };
        rustix::io::write(&had, b"x").expect("a client");
    }
}
