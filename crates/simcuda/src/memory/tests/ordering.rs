//! Fences, release and acquire, scopes: message passing between blocks as the PTX memory model has it.

use super::*;

const DATA: u64 = 0;
const FLAG: u64 = 512;

/// Warp 0 writes and publishes by `publish`, warp `to` observes by `observe` and reads.
fn pass(
    to: u32,
    publish: impl Fn(&mut Launch),
    observe: impl Fn(&mut Launch),
) -> Result<(), Fault> {
    let mut launch = Launch::global(1024);
    launch.write(by(0), DATA).unwrap();
    publish(&mut launch);
    observe(&mut launch);
    launch.read(by(to), DATA)
}

/// Block 1.
const OTHER: u32 = 4;

fn release(scope: Scope) -> impl Fn(&mut Launch) {
    move |launch| launch.write(by(0).release(scope), FLAG).unwrap()
}

fn acquire(warp: u32, scope: Scope) -> impl Fn(&mut Launch) {
    move |launch| launch.read(by(warp).acquire(scope), FLAG).unwrap()
}

fn fence_and_store(scope: Scope) -> impl Fn(&mut Launch) {
    move |launch| {
        launch.clocks.fence(0, scope);
        launch.write(by(0).strong(Scope::Device), FLAG).unwrap();
    }
}

fn load_and_fence(scope: Scope) -> impl Fn(&mut Launch) {
    move |launch| {
        launch.read(by(OTHER).strong(Scope::Device), FLAG).unwrap();
        launch.clocks.fence(OTHER, scope);
    }
}

#[test]
fn release_and_acquire_pass_a_message() {
    pass(OTHER, release(Scope::Device), acquire(OTHER, Scope::Device)).unwrap();
    pass(OTHER, fence_and_store(Scope::Device), acquire(OTHER, Scope::Device)).unwrap();
    pass(OTHER, release(Scope::Device), load_and_fence(Scope::Device)).unwrap();
    pass(OTHER, fence_and_store(Scope::Device), load_and_fence(Scope::Device)).unwrap();
}

#[test]
fn a_missing_half_passes_none() {
    let relaxed_store =
        |launch: &mut Launch| launch.write(by(0).strong(Scope::Device), FLAG).unwrap();
    let relaxed_load =
        |launch: &mut Launch| launch.read(by(OTHER).strong(Scope::Device), FLAG).unwrap();
    let late_fence = |launch: &mut Launch| {
        relaxed_store(launch);
        launch.clocks.fence(0, Scope::Device);
    };
    let early_fence = |launch: &mut Launch| {
        launch.clocks.fence(OTHER, Scope::Device);
        relaxed_load(launch);
    };
    fault(pass(OTHER, relaxed_store, acquire(OTHER, Scope::Device)), Class::Race, &[]);
    fault(pass(OTHER, release(Scope::Device), relaxed_load), Class::Race, &[]);
    fault(pass(OTHER, late_fence, acquire(OTHER, Scope::Device)), Class::Race, &[]);
    fault(pass(OTHER, release(Scope::Device), early_fence), Class::Race, &[]);
    fault(pass(OTHER, release(Scope::Device), acquire(8, Scope::Device)), Class::Race, &[]);
}

#[test]
fn a_plain_flag_is_itself_a_race() {
    let mut launch = Launch::global(1024);
    launch.clocks.fence(0, Scope::Device);
    launch.write(by(0), FLAG).unwrap();
    fault(launch.read(by(OTHER).acquire(Scope::Device), FLAG), Class::Race, &[]);
}

#[test]
fn block_scope_orders_nothing_for_other_blocks() {
    fault(
        pass(OTHER, fence_and_store(Scope::Block), acquire(OTHER, Scope::Device)),
        Class::Race,
        &[],
    );
    fault(
        pass(OTHER, fence_and_store(Scope::Device), load_and_fence(Scope::Block)),
        Class::Race,
        &[],
    );
    // The clocks alone: such a load is itself a race.
    let narrow = |launch: &mut Launch| {
        let Target::Global(_, base) = launch.target else { unreachable!() };
        launch.clocks.strong_load(OTHER, std::iter::once(base + FLAG), Scope::Block, true);
    };
    fault(pass(OTHER, release(Scope::Device), narrow), Class::Race, &[]);
    pass(1, release(Scope::Block), acquire(1, Scope::Block)).unwrap();
    pass(1, fence_and_store(Scope::Block), acquire(1, Scope::Block)).unwrap();
    pass(1, fence_and_store(Scope::Device), acquire(1, Scope::Block)).unwrap();
}

#[test]
fn a_fence_releases_only_what_came_before() {
    let publish = |launch: &mut Launch| {
        launch.clocks.fence(0, Scope::Device);
        launch.write(by(0), DATA + 4).unwrap();
        launch.write(by(0).strong(Scope::Device), FLAG).unwrap();
        launch.write(by(0), DATA + 8).unwrap();
    };
    pass(OTHER, publish, acquire(OTHER, Scope::Device)).unwrap();
    for at in [4, 8] {
        let mut launch = Launch::global(1024);
        publish(&mut launch);
        acquire(OTHER, Scope::Device)(&mut launch);
        fault(launch.read(by(OTHER), DATA + at), Class::Race, &[]);
    }
}

#[test]
fn a_strong_store_after_the_flag_is_not_released_with_it() {
    let mut launch = Launch::global(1024);
    launch.clocks.fence(0, Scope::Device);
    launch.write(by(0).strong(Scope::Device), FLAG).unwrap();
    launch.write(by(0).strong(Scope::Device), FLAG + 4).unwrap();
    acquire(OTHER, Scope::Device)(&mut launch);
    launch.write(by(OTHER), FLAG).unwrap();
    fault(launch.write(by(OTHER), FLAG + 4), Class::Race, &[]);
}

#[test]
fn a_weak_or_later_strong_store_takes_the_release_away() {
    let mut launch = Launch::global(1024);
    launch.write(by(0), DATA).unwrap();
    release(Scope::Device)(&mut launch);
    launch.write(by(0), FLAG).unwrap();
    // The clocks alone: a load would race with the plain store.
    let Target::Global(_, base) = launch.target else { unreachable!() };
    launch.clocks.strong_load(OTHER, std::iter::once(base + FLAG), Scope::Device, true);
    fault(launch.read(by(OTHER), DATA), Class::Race, &[]);

    let overwritten = |launch: &mut Launch| {
        release(Scope::Device)(launch);
        launch.write(by(8).strong(Scope::Device), FLAG).unwrap();
    };
    fault(pass(OTHER, overwritten, acquire(OTHER, Scope::Device)), Class::Race, &[]);
}

#[test]
fn atomics_hand_on_what_was_released() {
    let through = |launch: &mut Launch| {
        release(Scope::Device)(launch);
        launch.add(by(8).strong(Scope::Device), &[(0, FLAG)]).unwrap();
        launch.add(by(12).strong(Scope::Device), &[(0, FLAG)]).unwrap();
    };
    pass(OTHER, through, acquire(OTHER, Scope::Device)).unwrap();
}

#[test]
fn the_last_block_may_read_all_and_reset_the_counter() {
    for (scope, fine) in [(Scope::Device, true), (Scope::Block, false)] {
        let mut launch = Launch::global(1024);
        let atomic = |warp| by(warp).strong(Scope::Device);
        for block in 0..4 {
            for warp in 0..4 {
                launch.write(by(4 * block + warp), DATA + u64::from(4 * block + warp) * 4).unwrap();
                launch.clocks.fence(4 * block + warp, scope);
            }
            launch.clocks.barrier(block, 0, 0b1111);
            launch.add(atomic(4 * block), &[(0, FLAG)]).unwrap();
        }
        launch.clocks.fence(12, Scope::Device);
        launch.clocks.barrier(3, 0, 0b1111);
        let lanes: Vec<(u32, u64)> = (0..16).map(|lane| (lane, u64::from(lane) * 4)).collect();
        let read = launch.load(by(13), &lanes);
        let reset = launch.write(by(12), FLAG);
        if fine {
            read.unwrap();
            reset.unwrap();
        } else {
            fault(read, Class::Race, &["block 0"]);
            fault(reset, Class::Race, &[]);
        }
    }
}

#[test]
fn a_lock_passes_from_block_to_block() {
    let mut launch = Launch::global(1024);
    for warp in [0, 4, 8, 12, 0, 8] {
        launch
            .add(Access { acquire: true, ..by(warp).strong(Scope::Device) }, &[(0, FLAG)])
            .unwrap();
        launch.read(by(warp), DATA).unwrap();
        launch.write(by(warp), DATA).unwrap();
        launch.write(by(warp).release(Scope::Device), FLAG).unwrap();
    }
    fault(launch.write(by(4), DATA), Class::Race, &["block 2"]);
}

#[test]
fn what_is_passed_on_is_passed_on_by_others_too() {
    let relay = |launch: &mut Launch| {
        release(Scope::Device)(launch);
        launch.read(by(8).acquire(Scope::Device), FLAG).unwrap();
        launch.clocks.barrier(2, 0, 0b1111);
        launch.write(by(9).release(Scope::Device), FLAG + 8).unwrap();
    };
    let observe =
        |launch: &mut Launch| launch.read(by(OTHER).acquire(Scope::Device), FLAG + 8).unwrap();
    pass(OTHER, relay, observe).unwrap();
}

#[test]
fn a_barrier_hands_on_fences_and_what_was_read() {
    let publish = |launch: &mut Launch| {
        launch.clocks.fence(0, Scope::Device);
        launch.clocks.barrier(0, 0, 0b11);
        launch.write(by(1).strong(Scope::Device), FLAG).unwrap();
    };
    let observe = |launch: &mut Launch| {
        launch.read(by(5).strong(Scope::Device), FLAG).unwrap();
        launch.clocks.barrier(1, 0, 0b11);
        launch.clocks.fence(OTHER, Scope::Device);
    };
    pass(OTHER, publish, observe).unwrap();
    let without = |launch: &mut Launch| {
        launch.clocks.barrier(0, 0, 0b11);
        launch.write(by(1).strong(Scope::Device), FLAG).unwrap();
    };
    fault(pass(OTHER, without, observe), Class::Race, &[]);
}

#[test]
fn who_only_arrives_is_not_ordered_after_the_barrier() {
    let mut launch = Launch::global(64);
    launch.write(by(0), 0).unwrap();
    launch.clocks.arrive(0, 3);
    launch.write(by(0), 4).unwrap();
    launch.write(by(1), 8).unwrap();
    launch.clocks.barrier(0, 3, 0b10);
    launch.read(by(1), 0).unwrap();
    fault(launch.read(by(1), 4), Class::Race, &[]);
    fault(launch.read(by(0), 8), Class::Race, &[]);
}

#[test]
fn clocks_follow_their_definition() {
    let mut clocks = Clocks::new(&op(1), 100_000, 2);
    let (a, b, c) = (0, 1, 2 * 99_999);
    let before = clocks.now(a);
    assert!(!clocks.ordered(a, before, false, a) && !clocks.ordered(a, before, false, b));
    clocks.warp_sync(a);
    assert!(clocks.ordered(a, before, false, a) && !clocks.ordered(a, before, false, b));
    clocks.barrier(0, 0, 0b11);
    let after = clocks.now(a);
    assert!(clocks.ordered(a, before, false, b) && !clocks.ordered(a, after, false, b));
    clocks.strong_store(b, std::iter::once(64), Scope::Device, true);
    clocks.retire(0);
    clocks.strong_load(c, std::iter::once(64), Scope::Device, true);
    assert!(clocks.ordered(a, before, false, c) && clocks.ordered(b, before, false, c));
}

#[test]
fn a_hundred_thousand_blocks_look_back() {
    let blocks = 100_000;
    let mut clocks = Clocks::new(&op(1), blocks, 8);
    for block in 0..blocks {
        let warp = 8 * block;
        clocks.strong_load(warp, std::iter::once(u64::from(block) * 4), Scope::Device, true);
        clocks.barrier(block, 0, 0xff);
        clocks.strong_store(warp, std::iter::once(u64::from(block) * 4 + 4), Scope::Device, true);
        if block + 1 < blocks {
            clocks.retire(block);
        }
    }
    let last = 8 * (blocks - 1) + 7;
    assert!(clocks.ordered(8, 1, false, last) && !clocks.ordered(9, 3, false, last));
}
