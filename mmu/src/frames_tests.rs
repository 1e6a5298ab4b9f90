use std::collections::HashSet;

use super::*;

fn table(frames: &Frames, draw: Draw) -> Option<Mfn> {
    frames.allocate(FrameKind::Shadow(0), draw).map(|fresh| fresh.mfn)
}

#[derive(Debug, Default)]
struct Counting(AtomicU32);

impl Host for Counting {
    fn give_back(&self, frames: &[Mfn]) -> io::Result<()> {
        self.0.fetch_add(frames.len() as u32, Ordering::Relaxed);
        Ok(())
    }
}

#[derive(Debug)]
struct Refusing;

impl Host for Refusing {
    fn give_back(&self, _frames: &[Mfn]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[test]
fn allocation_visits_every_frame_once_and_then_ends() {
    for total in [2, 3, 10, 97, 1000] {
        let frames = Frames::new(total, 1, 0);
        let seen: HashSet<_> = std::iter::from_fn(|| table(&frames, Draw::Ordinary)).collect();
        assert_eq!(seen.len() as u32, total - 1);
        assert!(!seen.contains(&Mfn(0)), "reserved frames are not handed out");
        assert_eq!(frames.free_count(), 0);
    }
}

#[test]
fn a_guest_frame_never_has_the_number_of_its_gfn() {
    let frames = Frames::new(64, 0, 0);
    let mut got = 0;
    for gfn in 0..64 {
        if let Some(fresh) = frames.allocate(FrameKind::Guest(Gfn(gfn)), Draw::Ordinary) {
            assert_ne!(fresh.mfn.0, gfn);
            got += 1;
        }
    }
    assert!(got >= 63, "at most the last frame can be refused");
    assert_eq!(frames.counts().backed, got);
}

#[test]
fn neighbours_are_scattered() {
    let frames = Frames::new(10_000, 0, 0);
    let order: Vec<_> = (0..100).map(|_| table(&frames, Draw::Ordinary).unwrap().0).collect();
    assert!(order.windows(2).all(|w| w[0].abs_diff(w[1]) > 100));
}

#[test]
fn a_released_frame_comes_back_as_it_was_left() {
    let frames = Frames::new(2, 0, 0);
    let a = frames.allocate(FrameKind::Shadow(1), Draw::Ordinary).unwrap();
    assert!(a.zeroed);
    assert_eq!(frames.kind(a.mfn), FrameKind::Shadow(1));
    frames.release(a.mfn);
    assert_eq!(frames.kind(a.mfn), FrameKind::Free);
    let again = frames.allocate(FrameKind::Root(3), Draw::Ordinary);
    assert_eq!(again, Some(Fresh { zeroed: false, ..a }));
}

#[test]
fn the_reserve_is_for_those_who_may_draw_on_it() {
    let frames = Frames::new(1000, 0, 0);
    frames.set_budget(100);
    let Marks { reserve, low, .. } = frames.counts().marks;
    let mut drawn = 0;
    let mut wanted_at = None;
    while let Some(fresh) = frames.allocate(FrameKind::Shadow(0), Draw::Ordinary) {
        drawn += 1;
        if fresh.low && wanted_at.is_none() {
            wanted_at = Some(100 - drawn + 1);
        }
    }
    assert_eq!((drawn, wanted_at), (100 - reserve, Some(low)));
    let tables = std::iter::from_fn(|| table(&frames, Draw::Tables)).count() as u32;
    assert_eq!(tables, reserve - reserve / 2);
    assert_eq!(std::iter::from_fn(|| table(&frames, Draw::Reserve)).count() as u32, reserve / 2);
}

#[test]
fn low_memory_has_its_frames_whatever_others_take() {
    let frames = Frames::new(1000, 0, 20);
    frames.set_budget(100);
    while table(&frames, Draw::Reserve).is_some() {}
    let low = |gfn| frames.allocate(FrameKind::Guest(Gfn(gfn)), Draw::Ordinary);
    assert!(low(20).is_none(), "not low");
    let got: Vec<_> = (0..20).map_while(low).collect();
    assert_eq!((got.len(), frames.counts().backed), (20, 100));
    frames.release(got[0].mfn);
    assert!(
        table(&frames, Draw::Reserve).is_none(),
        "a frame that low memory gives back stays promised to it"
    );
    assert!(low(5).is_some());
}

#[test]
fn a_cut_budget_is_reached_by_giving_back() {
    let (frames, host) = (Frames::new(1000, 0, 0), Counting::default());
    frames.set_budget(500);
    let taken: Vec<_> = std::iter::from_fn(|| table(&frames, Draw::Reserve)).collect();
    assert_eq!(taken.len(), 500);
    frames.set_budget(100);
    assert_eq!(frames.trim(&host).unwrap(), 0, "all are in use");
    assert!(table(&frames, Draw::Reserve).is_none());
    taken[..450].iter().for_each(|mfn| frames.release(*mfn));
    assert!(frames.trim(&host).unwrap() >= 400);
    assert!(frames.counts().backed <= 100);
    assert_eq!(frames.free_count(), 950, "free, backed or not");
    frames.set_budget(500);
    let again: HashSet<_> = std::iter::from_fn(|| table(&frames, Draw::Reserve)).collect();
    assert_eq!((again.len(), frames.counts().backed), (450, 500));
}

#[test]
fn what_the_host_does_not_take_stays_free() {
    let frames = Frames::new(1000, 0, 0);
    let taken: Vec<_> = (0..100).map_while(|_| table(&frames, Draw::Reserve)).collect();
    frames.set_budget(10);
    taken.iter().for_each(|mfn| frames.release(*mfn));
    assert!(frames.trim(&Refusing).is_err());
    assert_eq!((frames.counts().backed, frames.free_count()), (100, 1000));
}

#[test]
fn metadata_stays_within_its_limit() {
    assert!(size_of::<Frame>() + size_of::<AtomicU64>() <= 24);
}
